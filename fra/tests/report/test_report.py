"""The page: self-contained, safe to open, and a function of the ledger alone."""

import base64
import hashlib
import html
import html.parser
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from fra.claim import Condition
from fra.plot import drawings
from fra.report import card_links
from fra.report import page as report
from fra.report.page import GLYPHS, render
from fra.report.views import Axis
from fra.report.words import GLOSSARY, glossed
from fra.tests.verdicts.test_claim import BAD, CLAIM, GOOD, OPEN, above, evidence, judge
from fra.tests.verdicts.test_ledger import make_ledger
from fra.verdicts import ledger as ledgers
from fra.verdicts.ledger import bare_row, row_of

HOSTILE = "<script>alert(1)</script>\" onload='x' {{ 7 * 7 }}\u202e\x00"


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, the texts, and whether tags are closed in order."""

    VOID = ("meta", "line", "circle", "path", "link", "img", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text, self.open, self.scripts = [], "", [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.text += data

    @property
    def own_script_only(self) -> bool:
        """Whether the one script is the page's own, by the hash in its policy."""
        [policy] = self.all("meta", **{"http-equiv": "Content-Security-Policy"})
        allowed = re.fullmatch(
            r"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-(.+)'", policy["content"]
        )
        found = hashlib.sha256("".join(self.scripts).encode()).digest()
        return len(self.scripts) == 1 and allowed[1] == base64.b64encode(found).decode()

    def all(self, tag: str, **attributes: str) -> list[dict]:
        return [a for t, a in self.tags if t == tag and attributes.items() <= a.items()]


def full_ledger():
    detail = {
        "channels": [{"q_feature": 3, "tokens": [HOSTILE, " the"]}, {"q_feature": 4, "tokens": []}],
        "nulls": {"scrambled": {"max": 0.29}, "lags": {"max": 0.1}},
        HOSTILE: [[1, 2], {"a": None}],
        "flag": True,
    }
    ledger = make_ledger(
        evidence((GOOD,), head="L0H0", detail=detail),
        evidence((BAD,), head="L0H1"),
        evidence((OPEN,), head="L1H0"),
        evidence(cannot=f"no dictionary {HOSTILE}", head="L1H2", n=0),
        evidence((replace(above(1.5), low=1.2),), head=None),
        model=HOSTILE,
    )
    broken = bare_row(CLAIM, "L1H1", "tiny", "BROKEN", f"KeyError: {HOSTILE}")
    turned = row_of(judge(CLAIM, evidence((GOOD,), head="L2H0")), "tiny", overturned=f"was refuted {HOSTILE}")
    return ledger.model_copy(update={"verdicts": sorted([*ledger.verdicts, broken, turned], key=lambda r: r.key)})


def test_every_word_of_the_ledger_is_data():
    text = render(full_ledger())
    page = Page(text)
    assert page.own_script_only
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("<script>alert(1)</script>") >= 6, "the hostile token is shown, as text"
    assert "{{ 7 * 7 }}" in page.text
    assert "\u202e" not in text
    assert "\x00" not in text
    assert "\\u202e" in page.text, "a direction character is shown as an escape"


STEERING = "".join(map(chr, (0, 7, 0x1B, 0x7F, 0x85, 0x61C, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))
"""NUL, other control characters, and every mark that turns the direction of what follows."""


def steered(value):
    """Every text of a ledger's header and detail with such characters in it."""
    if isinstance(value, dict):
        return {key: steered(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [steered(inner) for inner in value]
    return value + STEERING if isinstance(value, str) else value


def test_no_text_of_a_ledger_steers_its_page():
    """Neither names, paths and options of the header nor a claim's words, reasons and detail."""
    ledger = full_ledger()
    header, note = ledger.header, next(iter(ledger.header.claims.values()))
    words = {"title": note.title + STEERING, "h0": note.h0 + STEERING, "statistic": note.statistic + STEERING}
    changed = {name: steered(getattr(header, name)) for name in ("target", "model", "commit", "device", "seed")}
    changed |= {"versions": steered(header.versions), "options": steered({"--k": "a"}), "remarks": steered(["short"])}
    changed["claims"] = {name: note.model_copy(update=words) for name in header.claims}
    rows = [row.model_copy(update={"detail": steered(row.detail)}) for row in ledger.verdicts]
    made = ledger.model_copy(update={"header": header.model_copy(update=changed), "verdicts": rows})
    for text in (render(made), render(made, baseline=made)):
        assert not set(STEERING) & set(text)
        assert text.count("\\u202a\\u202b\\u202c\\u202d\\u202e\\u2066") > 10, "they are shown as escapes"
        assert Page(text).own_script_only


def test_nothing_is_loaded_from_elsewhere():
    text = render(full_ledger())
    page = Page(text)
    addresses = [a[name] for _, a in page.tags for name in ("src", "href", "action", "data") if name in a]
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    assert not re.search(r"url\(|@import|https?:", text)
    assert page.own_script_only


def test_the_grid_shows_each_head_by_glyph_and_word():
    page = Page(render(full_ledger()))
    titles = {a["title"]: a["class"] for a in page.all("td") if "title" in a}
    assert titles == {
        "L0H0 SUPPORTED": "SUPPORTED",
        "L0H1 REFUTED": "REFUTED",
        "L1H0 INCONCLUSIVE": "INCONCLUSIVE",
        "L1H1 BROKEN": "BROKEN",
        "L1H2 CANNOT_RUN": "CANNOT_RUN",
        "L2H0 SUPPORTED, overturned": "SUPPORTED",
    }
    assert len(set(GLYPHS.values())) == len(GLYPHS) == len(ledgers.WORDS), "the glyph alone tells the verdict"
    for link in page.all("a"):
        assert any(a.get("id") == link["href"][1:].replace("%3A", ":") for _, a in page.tags), link


def test_numbers_reasons_and_detail_are_there():
    text = Page(render(full_ledger())).text
    for piece in (
        "E <= 1",
        "mean/1",
        "power",
        "0.9",
        "q_feature",
        "scrambled",
        "0.29",
        "family",
        "was refuted",
        "KeyError",
    ):
        assert piece in text, piece
    assert "[1.2, ∞]" in text


def test_the_drawing_puts_the_interval_on_its_side_of_the_bar():
    rows = [
        row_of(judge(CLAIM, e), "t") for e in (evidence((replace(GOOD, low=1.5, high=3),)), evidence((above(1e9),)))
    ]
    axis = Axis.over(rows[:1])
    at = axis.drawing(rows[0])
    assert at["bar"] < at["low"] < at["effect"] < at["high"]
    assert not at["open_low"]
    assert not at["open_high"]
    cut = axis.drawing(rows[1])
    assert cut["open_high"], "no upper bound: an arrow"
    assert cut["effect"] <= 260, "never outside of the drawing"
    assert axis.drawing(bare_row(CLAIM, "L0H0", "t", "BROKEN", "x")) is None


@pytest.mark.parametrize("effect", [1.0, 0.0, -1e308, 1e308, 5e-324])
def test_the_drawing_survives_any_number(effect):
    condition = Condition("effect", effect, -1.7e308, 1.7e308, 1.0, 0.5, 0.5)
    row = row_of(judge(CLAIM, evidence((condition,))), "t")
    at = Axis.over([row]).drawing(row)
    assert all(0 <= at[name] <= 260 for name in ("low", "high", "effect", "bar"))


def test_the_page_rebuilt_from_the_file_is_the_same(tmp_path, capsys):
    source, page = tmp_path / "ledger.json", tmp_path / "out" / "page.html"
    ledgers.write(full_ledger(), source)
    assert report.main([str(source), "-o", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == render(full_ledger())
    assert "wrote" in capsys.readouterr().out


def test_an_unreadable_ledger_is_exit_code_2_and_one_sentence(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert report.main([str(tmp_path / "missing.json"), "-o", str(page)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be read" in said
    assert not page.exists()
    (tmp_path / "bad.json").write_text("{")
    command = [sys.executable, "-m", "fra.report", str(tmp_path / "bad.json"), "-o", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert not page.exists()


ROWS = [[2.0], [0.0, -1.0], [0.01, 0.5, None]]


@pytest.mark.parametrize("rows", [ROWS, ["2", "0 -1", "0 0.5"]], ids=["numbers", "text"])
def test_maps_are_drawn_and_their_words_are_data(rows):
    maps = {"channel": HOSTILE, "tokens": ["a", HOSTILE, "c"], "maps": {HOSTILE: rows}}
    not_maps = [
        {"tokens": ["a"], "maps": {"m": []}},
        {"tokens": ["a"], "maps": {"m": ["1 x"]}},
        {"tokens": 1, "maps": {}},
    ]
    page = Page(render(make_ledger(evidence((GOOD,), head="L0H0", detail={"map": maps, "not maps": not_maps}))))
    assert page.own_script_only
    assert page.text.count("<script>alert(1)</script>") >= 4, "name, channel, token, and the strongest entry"
    cells = [a for a in page.all("path") if "opacity" in a]
    assert sorted((a["opacity"], a.get("class")) for a in cells) == [("0.25", None), ("0.5", "n"), ("1.0", None)], (
        "opacity is the share of the largest; a negative cell is hollow; what cannot be seen is not drawn"
    )
    shown = [
        t
        for t in re.findall(
            r"<text[^>]*>([^<]*)</text>", render(make_ledger(evidence((GOOD,), head="L0H0", detail={"map": maps})))
        )
        if "script" in t
    ]
    assert [html.unescape(t) for t in shown] == ["<script>al\u2026"], "long tokens are cut, and seen to be"
    assert {a["opacity"]: a["d"] for a in cells} == {
        "1.0": "m0 0h1",
        "0.5": "M1 1h.72v.72h-.72z",
        "0.25": "m1 2h1",
    }, "column, row, in units of a cell"
    assert len(page.all("use")) == 2, "one list of tokens for both sides"
    assert "c (2) to" in page.text, "the strongest entries are told in words"
    assert page.text.count("full colour") == 1, "what is no map is no drawing"


def cells_of(path: str) -> set[tuple[int, int]]:
    """The (row, column) cells that a path of strokes goes along."""
    cells, x, y = set(), 0, 0
    for dx, dy, length in re.findall(r"m(\S+) (\S+?)h(\d+)", path):
        x, y = x + int(dx), y + int(dy)
        cells |= {(y, x + k) for k in range(int(length))}
        x += int(length)
    return cells


def test_cells_of_one_opacity_are_one_path():
    rows = [[1.0 if (s // 2 + t) % 2 else 0.5 for s in range(t + 1)] for t in range(40)]
    at = drawings.heat_map(rows, ["a"] * 40)
    assert [(opacity, negative) for opacity, negative, _ in at["paths"]] == [(0.5, False), (1.0, False)]
    for opacity, _, path in at["paths"]:
        assert cells_of(path) == {(t, s) for t in range(40) for s in range(t + 1) if rows[t][s] == opacity}
        assert path.count("m") < 0.6 * len(cells_of(path)), "neighbours are one stroke"


def test_a_cell_far_beyond_all_others_does_not_make_them_faint():
    rows = [[0.5] * (t + 1) for t in range(12)]
    rows[11][3] = 19.08
    at = drawings.heat_map(rows, ["a"] * 12)
    assert (at["full"], at["largest"]) == (0.5, 19.08)
    assert [opacity for opacity, _, _ in at["paths"]] == [1.0]
    page = Page(render(make_ledger(evidence((GOOD,), detail={"m": {"tokens": ["a"] * 12, "maps": {"m": rows}}}))))
    assert "full colour from 0.5, largest 19.08" in page.text
    for sizes, full in (
        ([1.0, 2.0, 3.0, 4.0, 19.08], 4.0),
        ([1.0, 2.0, 3.0, 4.0, 16.0], 16.0),
        ([1.0, 19.08], 19.08),
        ([1.0] * 5 + [19.0, 20.0], 20.0),
        ([1.0] * 8 + [19.0, 20.0], 1.0),
        ([0.0] * 9 + [1.0], 1.0),
        ([], 0.0),
    ):
        assert drawings.full_scale(sizes) == full


def test_an_effect_far_beyond_all_others_does_not_flatten_them():
    conditions = [replace(GOOD, effect=x, low=x - 0.05) for x in (1.1, 1.2, 1.3, 1.4, 1.5, 19.08)]
    rows = [row_of(judge(CLAIM, evidence((c,))), "t") for c in conditions]
    axis = Axis.over(rows)
    ats = [axis.drawing(row) for row in rows]
    assert [at["beyond"] for at in ats] == ["", "", "", "", "", "high"]
    assert ats[4]["effect"] - ats[0]["effect"] > 150, "the others fill the drawing"
    assert ats[5]["effect"] == 252
    text = render(make_ledger(*(evidence((c,), head=f"L0H{n}") for n, c in enumerate(conditions))))
    assert text.count('<path class="beyond"') == 1


def test_the_candidate_that_decides_is_the_one_that_is_marked():
    """ "best" is one thing: what the verdict rests on; a channel that is drawn says whether it is that."""
    maps = {"tokens": ["a"], "maps": {"m": ["1"]}}
    table = [{"channel": "1 -> 2", "effect": 1.0}, {"channel": "3 -> 4", "effect": 3.0}]
    own = {"1 -> 2": (GOOD,), "3 -> 4": (BAD,)}
    for drawn, says in (("1 -> 2", "rests on this channel"), ("3 -> 4", "rests on another channel, \u25b8 1 -> 2")):
        detail = {"best channel on a document": {"channel": drawn, **maps}, "best channels": table}
        text = render(make_ledger(replace(evidence((GOOD,), head="L0H0", detail=detail), candidates=own)))
        page = Page(text)
        assert says in page.text
        assert len(page.all("tr", **{"class": "best"})) == 2, "in the candidates and in the table"
        assert page.text.count("\u25b8 1 -> 2") == 2 + (drawn != "1 -> 2")
        assert "\u25b8 3 -> 4" not in page.text
        assert "best channel" not in page.text


def test_of_many_candidates_those_that_meet_most_are_shown():
    good = {f"{n} -> 0": (GOOD if n % 3 == 0 else BAD,) for n in range(50)}
    page = Page(render(make_ledger(replace(evidence((GOOD,), head="L0H0"), candidates=good))))
    shown = re.findall(r"(\d+) -> 0\u2713|(\d+) -> 0(?=\u2717)", page.text)
    assert len(shown) == 20
    assert [int(a) for a, _ in shown if a] == list(range(0, 50, 3)), "all that hold, in the order of the ledger"
    assert "Here: the 20 that meet most conditions; the ledger has the others" in page.text


def test_every_head_has_a_view_and_every_head_of_a_claim_an_address():
    rows = full_ledger().verdicts
    outside = [
        row.model_copy(update={"head": f"L3H{n}", "verdict": "NOT_APPLICABLE", "effect": None})
        for n, row in enumerate(rows[:2])
    ]
    ledger = full_ledger().model_copy(update={"verdicts": sorted([*rows, *outside], key=lambda r: r.key)})
    page = Page(render(ledger))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for row in ledger.verdicts:
        assert f"{row.claim}:{row.head or 'family'}" in ids
        assert row.head is None or row.head in ids
    assert "Not about L3H0: T01" in page.text


def test_words_of_the_suite_tell_their_meaning_where_they_stand_first():
    shown = str(glossed("Every TIH has CIH channels <b> TIHs, nats, scrambles, scrambled, alternate candidates"))
    assert re.findall(r">([^<]+)</abbr>", shown) == ["TIH", "CIH", "channels", "nats", "scrambles", "candidates"]
    assert "&lt;b&gt; TIHs" in shown
    assert {"TIH", "CIH", "stripe", "nat", "candidate", "scramble", "discovery"} <= GLOSSARY.keys()
    assert "alternate" in shown.rsplit("</abbr>", 2)[1]


def test_curves_are_drawn_and_their_words_are_data():
    curve = {"x": [1, 50, 500], "curves": {HOSTILE: [0.1, 0.5, None], "atoms": [0.0, -0.2, 0.1]}}
    page = Page(render(make_ledger(evidence((GOOD,), head="L0H0", detail={"curve": curve}))))
    assert page.own_script_only
    lines = page.all("polyline")
    assert [len(a["points"].split()) for a in lines] == [2, 3], "a point for each number"
    assert len({a["stroke-dasharray"] for a in lines}) == 2, "lines are told apart without colour"


def strip(**changes):
    fires = {"tokens": [HOSTILE, "b", "c", "d"], "values": "0.5 1 0 -2", "marked": 1}
    return {"feature": 7, "dictionary": HOOK, "strips": {HOSTILE: fires | changes}}


HOOK = "blocks.1.attn.hook_z"


def test_strips_are_shaded_tokens_and_their_words_are_data():
    page = Page(render(make_ledger(evidence((GOOD,), head="L0H0", detail={"strip": strip()}))))
    assert page.own_script_only
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    shades = [(a["class"], a["title"]) for a in page.all("i")]
    assert shades == [("p2", "0.5"), ("p5", "1"), ("n10", "-2")], "what is negative is bracketed by its class"
    assert page.text.count("<script>alert(1)</script>") == 2, "name and token"
    for wrong in ({"values": "1 2 3"}, {"values": "1 2 3 x"}, {"marked": "1"}, {"tokens": [1, 2, 3, 4]}):
        assert not Page(render(make_ledger(evidence((GOOD,), head="L0H0", detail={"s": strip(**wrong)})))).all("i")
    for odd in ({"values": "nan inf -inf 1"}, {"marked": 99}, {"marked": -5}):
        assert Page(render(make_ledger(evidence((GOOD,), head="L0H0", detail={"s": strip(**odd)})))).all("i")


def test_whatever_stands_in_a_drawing_the_page_is_made():
    maps = {
        "tokens": [],
        "maps": {},
        "dictionary": {"a": 1},
        "feature": [1],
        "pages": {"x": None},
        "items": 1,
        "get": 2,
    }
    odd = {"strips": {}, "dictionary": [], "feature": {"a": [HOSTILE]}, "tokens": None}
    rows = [{"feature": [1]}, {"feature": {"b": 2}}]
    detail = {"dictionary": [HOSTILE], "m": maps, "s": odd, "both": {"a": maps, "b": odd}, "rows": rows, "empty": {}}
    page = Page(render(make_ledger(evidence((GOOD,), head="L0H0", detail=detail))))
    assert page.own_script_only
    assert page.text.count("Queries down") == 2


def test_drawings_come_before_tables_and_several_stand_by_name():
    maps = {"tokens": ["a"], "maps": {"attention": ["1"]}}
    detail = {"some table": [{"a": 1}, {"a": 2}], "pictures": {"seed 1": maps, "seed 2": maps}}
    page = Page(render(make_ledger(evidence((GOOD,), head="L0H0", detail=detail))))
    assert page.text.count("full colour") == 2
    for earlier, later in (("What decided", "pictures"), ("pictures", "seed 1"), ("seed 2", "some table")):
        assert page.text.index(earlier) < page.text.index(later)


def test_only_addresses_on_neuronpedia_are_links():
    good = "https://www.neuronpedia.org/gpt2-small/5-res-jb/17"
    bad = ["https://elsewhere.org/x", "https://www.neuronpedia.org/'onclick=1", "javascript:alert(1)", f"{good}\n"]
    page = Page(render(make_ledger(evidence((GOOD,), head="L0H0", detail={"pages": [good, *bad]}))))
    assert [a["href"] for a in page.all("a") if not a["href"].startswith("#")] == [good]
    assert "https://elsewhere.org/x" in page.text
    assert page.text.count("gpt2-small/5-res-jb/17") == 2, (
        "without the part that all share; the one that is no link whole"
    )


def test_cards_beside_the_page_are_linked(tmp_path, capsys):
    """Cards of the ledger's own target and weights, relative to the page; any other are left alone."""
    model = f"model, sha256 {'ab' * 32}"
    table = [{"feature": 7, "hits": 1}, {"feature": 8, "hits": 2}]
    detail = {"strip": strip(), "dictionary": HOOK, "features": table}
    ledger = make_ledger(evidence((GOOD,), head="L0H0", detail=detail), model=model)
    source, page = tmp_path / "ledger.json", tmp_path / "out" / "report.html"
    ledgers.write(ledger, source)
    name, mark = ledger.header.target, "ab" * 32

    def links(*args):
        assert report.main([str(source), "-o", str(page), *args]) == 0
        return [a["href"] for a in Page(page.read_text(encoding="utf-8")).all("a") if not a["href"].startswith("#")]

    assert links() == []
    card_links.write(tmp_path / "out" / "cards" / "a b", name, mark, HOOK, {"L1H0.html": [7], "L1H1.html": [9]})
    index, card = "cards/a%20b/index.html", "cards/a%20b/L1H0.html#f7"
    assert links() == [index, card, card], "the index, the strip's feature, the table's; feature 8 has no card"
    elsewhere = tmp_path / "more"
    card_links.write(elsewhere / "z", name, mark, HOOK, {"L1H0.html": [8]})
    assert links("--cards", str(elsewhere)) == ["../more/z/index.html", "../more/z/L1H0.html#f8"]
    card_links.write(tmp_path / "out" / "cards" / "a b", name, "cd" * 32, HOOK, {"L1H0.html": [7]})
    assert links() == [], "of other weights"
    card_links.write(tmp_path / "out" / "cards" / "a b", "another", mark, HOOK, {"L1H0.html": [7]})
    assert links() == []
    capsys.readouterr()
    assert report.main([str(source), "-o", str(page), "--cards", str(tmp_path / "none")]) == 2
    for wrong in (
        "{",
        "[]",
        '{"target": "t"}',
        json.dumps({"target": name, "fingerprint": mark, "hook": HOOK, "pages": {"javascript:x": [7]}}),
    ):
        (tmp_path / "out" / "cards" / "a b" / "features.json").write_text(wrong)
        assert report.main([str(source), "-o", str(page)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 5
    assert "there is no folder" in said[0]
    assert all("make the cards again" in line for line in said[1:])


def test_an_empty_ledger_has_a_page():
    assert "holds no verdicts" in Page(render(make_ledger())).text


def test_many_heads_that_cannot_run_fold_away():
    few, many = (
        render(make_ledger(*[evidence(cannot="no dictionary there", head=f"L0H{h}", n=0) for h in range(n)]))
        for n in (8, 9)
    )
    assert len(Page(few).all("p", **{"class": "unit", "data-v": "CANNOT_RUN"})) == 1
    assert not Page(many).all("p", **{"class": "unit"})
    assert len(Page(many).all("details", **{"class": "unit", "data-v": "CANNOT_RUN"})) == 1
    assert "9 heads: no dictionary there" in Page(many).text
    assert {f"T01:L0H{h}" for h in range(9)} <= {a["id"] for a in Page(many).all("span") if "id" in a}
