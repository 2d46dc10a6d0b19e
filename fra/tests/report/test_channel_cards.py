"""Cards of an attention-input dictionary: the numbers are the model's own, every link leads somewhere, every token and
label is text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch

import fra
from fra.cards import channels_in
from fra.errors import FraError
from fra.features.query_key import query_key_cards
from fra.report import card_links, channel_pages
from fra.report.channel_pages import QueryKeyCards
from fra.report.page import render
from fra.stimuli.natural import natural_documents
from fra.tests.models import tiny, tiny_sae
from fra.tests.report.test_report import Page
from fra.tests.verdicts.test_claim import GOOD, evidence
from fra.tests.verdicts.test_ledger import make_ledger
from fra.verdicts import ledger as ledgers

HOOK = "blocks.1.ln1.hook_normalized"
HOSTILE = "<script>alert(1)</script>\u202e\x00"
TEXTS = [f"one and {a} make more than one, said {b}. four and five make {a}" for a in ("two", "six") for b in "xyzuvw"]
LABELS = {feature: f"{HOSTILE} {feature}" for feature in range(0, 64, 3)}


def target_of(kind: str) -> Any:
    return fra.load(tiny(kind), tiny_sae(HOOK), TEXTS)


@pytest.fixture(scope="module", params=["gpt2", "pythia"])
def made(request: pytest.FixtureRequest) -> tuple[Any, QueryKeyCards]:
    target = target_of(request.param)
    return target, query_key_cards(target, HOOK, strongest=6, named=[(1, 2)], labels=LABELS)


def written(sae: Any, acts: torch.Tensor, feature: int) -> torch.Tensor:
    """What one feature puts into the reconstruction of a position, by the dictionary's own decode. The norm's output
    has no mean, so that a feature's own mean is no part of it.
    """
    alone = torch.zeros_like(acts)
    alone[feature] = acts[feature]
    vector: torch.Tensor = sae.decode(alone[None])[0] - sae.decode(torch.zeros_like(alone)[None])[0]
    return vector - vector.mean()


def contributions(target: Any, tokens: torch.Tensor, head: int, q: tuple[int, int], k: tuple[int, int]) -> float:
    """F at one pair of positions (feature, position), from the model's own scores alone: what the scores have of both
    features together and not of either, by taking each out of the input.
    """
    sae = target.dictionaries[HOOK]
    own: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook: Any) -> None:
        own[hook.name] = value.detach()

    scores = "blocks.1.attn.hook_attn_scores"
    target.model.run_with_hooks(tokens[None], fwd_hooks=[(HOOK, keep)])
    acts = sae.encode(own[HOOK])[0]
    took = []
    for without in ((), (q,), (k,), (q, k)):

        def edit(value: torch.Tensor, hook: Any, without: Any = without) -> torch.Tensor:
            value = value.clone()
            for feature, pos in without:
                value[0, pos] -= written(sae, acts[pos], feature)
            return value

        target.model.run_with_hooks(tokens[None], fwd_hooks=[(HOOK, edit), (scores, keep)])
        took.append(own[scores][0, head, q[1], k[1]].double())
    return float(took[0] - took[1] - took[2] + took[3])


@torch.no_grad()
def test_every_number_of_a_channel_is_what_the_models_scores_have_of_it(made: tuple[Any, QueryKeyCards]) -> None:
    target, found = made
    documents = natural_documents(target, found.n_documents)
    sae = target.dictionaries[HOOK]
    live = []
    for tokens in documents:
        _, cache = target.model.run_with_cache(tokens[None], names_filter=[HOOK])
        live.append((sae.encode(cache[HOOK])[0] > 0)[1:])
    # Of a feature pair at one position the scores have either as query: such channels are left out here.
    apart = {
        pair: card
        for pair, card in found.channels.items()
        if not any(bool((own[:, pair[0]] & own[:, pair[1]]).any()) for own in live) and card.heads[0].count > 11
    }
    card = min(apart.values(), key=lambda card: card.heads[0].count)
    own = card.heads[0]
    values: dict[tuple[int, int, int], float] = {}
    for number, (tokens, here) in enumerate(zip(documents, live, strict=True)):
        for t in (1 + torch.nonzero(here[:, card.q_feature])[:, 0]).tolist():
            for s in (1 + torch.nonzero(here[:t, card.k_feature])[:, 0]).tolist():
                place = (card.q_feature, t), (card.k_feature, s)
                values[number, t, s] = contributions(target, tokens, own.head, *place)
    assert own.count == len(values)
    assert own.total == pytest.approx(sum(values.values()), rel=1e-3, abs=1e-4)
    assert own.mean == pytest.approx(sum(values.values()) / len(values), rel=1e-3, abs=1e-5)
    assert own.largest == pytest.approx(max(values.values(), key=abs), rel=1e-3, abs=1e-5)
    best = {n: max(abs(v) for (d, _, _), v in values.items() if d == n) for n in {d for d, _, _ in values}}
    assert [abs(at.value) for at in card.contexts] == pytest.approx(sorted(best.values(), reverse=True)[:8], rel=1e-3)
    for at in card.contexts:
        assert at.value == pytest.approx(values[at.document, at.q_pos, at.k_pos], rel=1e-3, abs=1e-5)
        assert list(at.tokens) == [target.tokenizer.decode([token]) for token in documents[at.document].tolist()]
    for other in found.channels.values():
        assert [abs(h.mean) for h in other.heads] == sorted((abs(h.mean) for h in other.heads), reverse=True)


@torch.no_grad()
def test_the_coupling_is_a_score_per_unit_of_both_activations(made: tuple[Any, QueryKeyCards]) -> None:
    """By distance where positions rotate: from the model's scores at pairs that far apart."""
    target, found = made
    documents = natural_documents(target, found.n_documents)
    sae, checked = target.dictionaries[HOOK], 0
    assert bool(found.offsets) == (target.model.cfg.positional_embedding_type == "rotary")
    for card in found.channels.values():
        for at in card.contexts:
            back = at.q_pos - at.k_pos
            if checked > 15 or back == 0 or (found.offsets and back not in found.offsets):
                continue
            tokens = documents[at.document]
            _, cache = target.model.run_with_cache(tokens[None], names_filter=[HOOK])
            acts = sae.encode(cache[HOOK])[0]
            both = 1.0
            for feature, pos in ((card.q_feature, at.q_pos), (card.k_feature, at.k_pos)):
                both *= float(written(sae, acts[pos], feature).norm() / (d := sae.W_dec[feature]).sub(d.mean()).norm())
            own = card.heads[0]
            place = (card.q_feature, at.q_pos), (card.k_feature, at.k_pos)
            expected = contributions(target, tokens, own.head, *place) / both
            shown = own.coupling[found.offsets.index(back) if found.offsets else 0]
            assert shown == pytest.approx(expected, rel=2e-3, abs=1e-5)
            checked += 1
    assert checked > 2


def test_partners_are_the_strongest_of_every_feature(made: tuple[Any, QueryKeyCards]) -> None:
    """Against every live channel of the census, by another way through it: all at once, and sums by counts."""
    target, found = made
    documents = natural_documents(target, found.n_documents)
    feature, card = max(found.features.items(), key=lambda pair: pair[1].density)
    means: dict[int, list[float]] = {}
    for tokens in documents:
        m = fra.resolve(target.model, target.dictionaries[HOOK], tokens, layer=1, head=0)
        for other in range(m.d_sae):
            F = m.channel(feature, other).double()[1:, 1:]
            means.setdefault(other, []).extend(F[F != 0].tolist())
    ranked = {k: sum(v) / len(v) for k, v in means.items() if len(v) >= found.min_count}
    best = sorted(ranked, key=lambda k: -abs(ranked[k]))[:5]
    assert [partner.feature for partner in card.as_query[0]] == best
    assert [partner.mean for partner in card.as_query[0]] == pytest.approx([ranked[k] for k in best], rel=1e-3)
    assert [partner.count for partner in card.as_query[0]] == [len(means[k]) for k in best]


def test_the_pages_hang_together_and_every_word_is_text(made: tuple[Any, QueryKeyCards], tmp_path: Path) -> None:
    target, found = made
    folder, report = tmp_path / "cards" / "one", tmp_path / "report.html"
    n = channel_pages.write_pages(found, folder, fingerprint=target.fingerprint(), report=report)
    pages = {file.name: Page(file.read_text(encoding="utf-8")) for file in folder.glob("*.html")}
    assert len(pages) == n == 1 + found.n_heads + len(found.channels) + len(found.on_page)
    ids = {name: {a["id"] for _, a in page.tags if "id" in a} for name, page in pages.items()}
    for name, page in pages.items():
        assert "alert(1)" in page.text or not name.startswith(("index", "L1H", "features"))
        assert not [tag for tag, _ in page.tags if tag in ("img", "link", "iframe")]
        assert [tag for tag, _ in page.tags].count("script") == (name == "index.html")
        raw = (folder / name).read_text(encoding="utf-8")
        assert "\u202e" not in raw and "\x00" not in raw and "<script>alert" not in raw
        for link in page.all("a"):
            address, _, fragment = unquote(link["href"]).partition("#")
            if address == "../../report.html":
                continue
            assert address in pages, (name, address)
            assert not fragment or fragment in ids[address], (name, link)
    assert {f"f{feature}" for feature in found.features} == set().union(
        *(own for name, own in ids.items() if name.startswith("features-"))
    ) - {"jump", "said"}
    assert "c1-2.html" in pages, "a channel that was named has its page"
    heads = pages[f"L1H{found.n_heads - 1}.html"].text
    assert all(f"{feature}" in heads for feature in found.features), "all features of a head"


def test_rows_of_a_report_lead_to_channels_with_their_labels(made: tuple[Any, QueryKeyCards], tmp_path: Path) -> None:
    target, found = made
    folder = tmp_path / "cards" / "one"
    channel_pages.write_pages(found, folder, fingerprint=target.fingerprint())
    links = card_links.read(folder.parent, tmp_path / "report.html", target.name, f"model, {target.fingerprint()}")
    assert links.channel("L1H0", "1 -> 2") == "cards/one/c1-2.html"
    assert links.channel("L0H0", "1 -> 2") == links.channel(None, "1 -> 2") == "", "of another layer"
    detail = {"strongest channels": ["1 -> 2", "63 -> 63"], "best channels": [{"channel": "1 -> 2", "effect": 1.0}]}
    others = {"strongest channel of every seed": {"seed 1": ["1 -> 2"]}}
    ledger = make_ledger(
        evidence((GOOD,), head="L1H0", detail=detail),
        evidence((GOOD,), head="L0H0", detail=detail),
        evidence((GOOD,), head="L1H1", detail=others),
    )
    page = Page(render(ledger, links))
    assert [a["href"] for a in page.all("a")].count("cards/one/c1-2.html") == 2
    assert HOSTILE.split("<")[0] in page.text
    file = tmp_path / "ledger.json"
    ledgers.write(ledger, file)
    assert channels_in(file, 1) == [(1, 2), (63, 63)]
    twice = json.loads((folder / card_links.FILE).read_text())
    (tmp_path / "cards" / "two").mkdir()
    (tmp_path / "cards" / "two" / card_links.FILE).write_text(json.dumps(twice | {"hook": "blocks.1.hook_resid_pre"}))
    both = card_links.read(folder.parent, tmp_path / "report.html", target.name, f"model, {target.fingerprint()}")
    assert both.channel("L1H0", "1 -> 2") == "", "which of two dictionaries is not known"


def test_what_does_not_fit_is_one_sentence() -> None:
    target = target_of("gpt2")
    for options, says in (({"named": [(1, 99999)]}, "99999 is out of range"), ({"strongest": 1}, "at least 2")):
        with pytest.raises(FraError, match=says):
            query_key_cards(target, HOOK, **options)
