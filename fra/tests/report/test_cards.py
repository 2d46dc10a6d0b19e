"""Feature cards: what they show is what the model and the dictionary did, and every token is text."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fra import attribution, cards
from fra.attribution.head_outputs import Live
from fra.attribution.raised_tokens import direct_logits
from fra.report import card_links
from fra.report.card_pages import Card, CardExample, render_head, write_pages
from fra.stimuli.natural import natural_documents
from fra.targets.target import Target, load_target

HOOK = "blocks.2.attn.hook_z"
HOSTILE = "<script>alert(1)</script>\u202e\x00"
ABOUT = {"report": "", "target": HOSTILE, "hook": HOOK, "layer": 2, "d_sae": 9}


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("mini")


@pytest.fixture(scope="module")
def made(target: Target) -> dict[int, list[Card]]:
    return cards.cards(target, HOOK, n_documents=8)


def test_activations_are_those_of_the_dictionary(target: Target, made: dict[int, list[Card]]) -> None:
    """SAELens' own encode of the model's own hook_z, document by document."""
    sae, documents = target.dictionaries[HOOK], natural_documents(target, 8)
    acts = []
    with torch.no_grad():
        for document in documents:
            _, cache = target.model.run_with_cache(document[None], names_filter=[HOOK])
            acts.append(sae.encode(cache[HOOK].reshape(1, len(document), target.n_heads, -1))[0, 1:])
    flat = torch.cat(acts)
    shown = {card.feature: card for own in made.values() for card in own}
    assert sorted(shown) == torch.nonzero((flat > 0).any(0))[:, 0].tolist(), "every feature that fires, and no other"
    for feature in sorted(shown)[::37]:
        card, values = shown[feature], flat[:, feature]
        assert card.density == pytest.approx(float((values > 0).double().mean()))
        assert card.largest == pytest.approx(float(values.max()), rel=1e-4)
        assert sum(card.histogram) == int((values > 0).sum())
        best = sorted((float(own[:, feature].max()) for own in acts if own[:, feature].max() > 0), reverse=True)
        assert [e.value for e in card.examples] == pytest.approx(best[: cards.EXAMPLES], rel=1e-4)


def test_sources_add_up_to_what_the_feature_sees(target: Target, made: dict[int, list[Card]]) -> None:
    sae, documents = target.dictionaries[HOOK], natural_documents(target, 8)
    texts = [[str(target.tokenizer.decode([int(t)])) for t in document] for document in documents]
    checked = 0
    for card in [card for own in made.values() for card in own][::53]:
        for example in card.examples[:2]:
            document = documents[texts.index(list(example.tokens))]
            feature = torch.tensor([card.feature])
            seen = attribution.pre_activation(target.model, sae, document, feature)[example.pos, 0]
            bias = attribution.observe(target.model, sae, document).bias(feature)[0]
            assert sum(example.sources) == pytest.approx(float(seen - bias), abs=1e-3)
            assert len(example.sources) == example.pos + 1
            checked += 1
    assert checked > 10


def test_logits_and_heads_are_those_of_the_decoder(target: Target, made: dict[int, list[Card]]) -> None:
    """A lens of its own: the decoder row written into the residual stream, through the model's final norm direction."""
    sae, model = target.dictionaries[HOOK], target.model
    card = made[3][0]
    row = sae.W_dec[card.feature].detach().view(target.n_heads, -1)
    written = sum(row[h] @ model.blocks[2].attn.W_O[h] for h in range(target.n_heads)).detach()
    centred = (written - written.mean()) * model.ln_final.weight.detach()
    expected = (centred @ model.W_U.detach()).topk(cards.LOGITS)
    assert [v for _, v in card.top] == pytest.approx(expected.values.tolist(), rel=1e-3)
    norms = row.norm(dim=-1)
    assert card.share == pytest.approx((norms / norms.sum()).tolist(), rel=1e-4)
    assert all(max(c.share) == c.share[h] for h, own in made.items() for c in own)
    assert direct_logits(model, sae, torch.tensor([card.feature])).shape == (1, model.cfg.d_vocab)


@given(st.integers(0, 2**32 - 1), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_examples_are_the_strongest_of_different_documents(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    columns = [torch.from_numpy(rng.integers(0, high, n)) for high in (4, 6, 3)]
    live = Live(*columns, torch.from_numpy(rng.random(n)))
    found = cards.examples_of(live, 2)
    for feature in range(3):
        best = {}
        for d, f, v in zip(live.doc.tolist(), live.feature.tolist(), live.value.tolist(), strict=True):
            if f == feature:
                best[d] = max(best.get(d, 0.0), v)
        expected = sorted(best.values(), reverse=True)[:2]
        assert found.value[found.feature == feature].tolist() == expected


class Page(HTMLParser):
    """Text, and elements with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags = "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def hostile_card() -> Card:
    example = CardExample([HOSTILE, "b", "c", "d"], 2, {1: 0.5, 2: 1.0}, [0.2, -2.0, 1.0])
    word = [(HOSTILE, 1.0)]
    return Card(7, 0.1, 1, 1.0, [0, 3, 1], 0.1, [0.25, 0.75], word, word, [example])


def test_tokens_are_text_and_negative_sources_are_marked_without_colour() -> None:
    text = render_head([hostile_card()], 1, by_head={0: [], 1: [hostile_card()]}, **ABOUT)
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "link", "iframe")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "alert(1)" in page.text
    assert "\u202e" not in text
    assert "\x00" not in text
    shades = [(a["class"], a["title"]) for tag, a in page.tags if tag == "i" and "title" in a]
    assert shades == [("p5", "0.5"), ("p10", "1"), ("p1", "0.2"), ("n10", "-2"), ("p5", "1")]
    assert 'content: "["' in text, "brackets, not colour alone"
    assert hostile_card().examples[0].strongest == 2, "the largest contribution, not the largest in size"
    addresses = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
    assert addresses
    assert all(not address.startswith(("http", "//", "javascript")) for address in addresses)


def test_pages_of_all_heads(tmp_path) -> None:
    assert write_pages({0: [], 1: [hostile_card()]}, tmp_path / "new", "t", HOOK, 2, 9) == 3
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "L2H0.html",
        "L2H1.html",
        "features.json",
        "index.html",
    ]
    index = Page((tmp_path / "new" / "index.html").read_text(encoding="utf-8"))
    assert "L2H1.html#f7" in [a.get("href") for tag, a in index.tags if tag == "a"]
    assert "1 of 9 features fire" in index.text
    assert "report" not in index.text


def test_cards_and_report_find_each_other(tmp_path) -> None:
    """Each page goes back to the report, a head's to the head's row; the report reads which feature stands where."""
    folder, report = tmp_path / "build" / "cards" / "z", tmp_path / "build" / "report.html"
    write_pages({0: [], 1: [hostile_card()]}, folder, "t", HOOK, 2, 9, fingerprint="ab", report=report)
    pages = {name: Page((folder / name).read_text(encoding="utf-8")) for name in ("index.html", "L2H1.html")}
    back = {name: next(a["href"] for tag, a in page.tags if tag == "a") for name, page in pages.items()}
    assert back == {"index.html": "../../report.html", "L2H1.html": "../../report.html#D07:L2H1"}
    links = card_links.read(folder.parent, report, "t", "model, sha256 ab")
    assert links.features == {(HOOK, "7"): "cards/z/L2H1.html#f7"}
    assert 'id="f7"' in (folder / "L2H1.html").read_text(encoding="utf-8")
    assert card_links.read(folder.parent, report, "t", None).features == {}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["mini", "--hook", "blocks.9.attn.hook_z"], "has no dictionary at"),
        (["mini", "--hook", HOOK, "--documents", "0"], "documents=0 asks for none"),
        (["mini", "--hook", HOOK, "--labels", "/no/such/labels.csv"], "cannot be read"),
        (["mini", "--hook", "blocks.1.ln1.hook_normalized", "--ledger", "/no/such/ledger"], "/no/such/ledger"),
        (["nobody", "--hook", HOOK], "nobody"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_sentence(args, says, tmp_path, capsys) -> None:
    assert cards.main([*args, "--quiet", "-o", str(tmp_path / "pages")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert says in said
    assert not (tmp_path / "pages").exists()


def test_dead_features_are_left_out() -> None:
    card = dataclasses.replace(hostile_card(), feature=3)
    text = render_head([card], 0, by_head={0: [card]}, **ABOUT)
    assert "feature 3" in text
    assert "1 of 9 features" in text
