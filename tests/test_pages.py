"""The built book: light, whole, described, linked, and on its own without a network."""

from __future__ import annotations

import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import yaml

import book
import pages

# The first test that asks for the site builds it: under a minute on an idle machine.
pytestmark = pytest.mark.timeout(1800)

PAGE_BYTES = 2_000_000
SHARED_BYTES = 5_000_000
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                               "google-chrome"))), None)  # fmt: skip


class Page(HTMLParser):
    """What the tests ask about one page."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.path = path
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.images: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.hidden: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if "hidden" in values and "article" in self.tags:
            self.hidden.append(tag)
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "img":
            self.images.append(values)
        if tag == "link":
            kinds = {"stylesheet", "preload", "icon", "shortcut", "modulepreload"}
            if kinds & set(values.get("rel", "").split()):
                self.loaded.append(values["href"])
        if tag in ("script", "img", "iframe", "video", "audio", "source", "embed"):
            self.loaded += [values[k] for k in ("src", "data") if values.get(k)]
            self.loaded += [
                part.split()[0] for part in values.get("srcset", "").split(",") if part
            ]
        style = values.get("style", "")
        self.loaded += css_urls(style)


def css_urls(text: str) -> list[str]:
    """Return what a style sheet loads, without what it holds itself."""
    found = re.findall(r"url\(\s*['\"]?([^'\")]+)['\"]?\s*\)", text)
    found += re.findall(r"@import\s+['\"]([^'\"]+)['\"]", text)
    return [url for url in found if not url.startswith(("data:", "#", "%23"))]


def is_elsewhere(url: str) -> bool:
    return bool(re.match(r"(?:[a-z]+:)?//", url)) or url.startswith(("http:", "https:"))


@pytest.fixture(scope="session")
def site() -> Path:
    """Return the site of the strict build; build it if it is not that of these files.

    One build serves all tests of this file, and a later `make strict` is clean anyway.
    """
    built = book.BUILD / "strict" / "_build" / "html"
    if not book.is_built(built):
        tool = book.HOME / "tools" / "book.py"
        done = subprocess.run(
            [sys.executable, str(tool), "strict"],
            cwd=book.HOME, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-1500:]
    return built


@functools.cache
def parsed(path: Path) -> Page:
    return Page(path)


def every_page(site: Path) -> list[Page]:
    found = [parsed(path) for path in sorted(site.rglob("*.html"))
             if "_static" not in path.parts]  # fmt: skip
    assert len(found) > 20
    return found


def chapters(site: Path) -> Iterator[Page]:
    for path in book.notebooks():
        yield parsed(site / "book" / f"{path.stem}.html")


# --- what a page is made of ---------------------------------------------------------


def test_every_image_is_described(site):
    for page in every_page(site):
        for image in page.images:
            alt = image.get("alt", "")
            if not alt and image.get("role") == "presentation":
                continue
            where = f"{page.path.name}: {image.get('src')}"
            assert 40 <= len(alt) <= 400, f"{where}: {alt!r}"
            assert not re.search(r"[\w/]+\.(?:png|svg|jpe?g)\b", alt), f"{where}: {alt}"


def test_a_picture_opens_at_its_own_size(site):
    found = 0
    for path in (page.path for page in every_page(site)):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r'<img\b[^>]*\bsrc="([^"]*_images/[^"]+)"', text):
            before = text[: match.start()].rstrip()
            link = re.search(r'<a\b[^>]*href="([^"]+)"[^>]*>$', before)
            assert link and link[1] == match[1], (path.name, match[0])
            found += 1
        assert pages.link_images(text) == text
    assert found > 50


def test_nothing_is_requested_from_another_host(site):
    for page in every_page(site):
        elsewhere = [url for url in page.loaded if is_elsewhere(url)]
        assert not elsewhere, (page.path.name, elsewhere)
        text = page.path.read_text(encoding="utf-8")
        for script in re.findall(r"<(?:script|style)[^>]*>([^<]*)</", text):
            assert not re.search(r"https?://", script), (page.path.name, script[:200])
    for path in site.rglob("*.css"):
        elsewhere = [u for u in css_urls(path.read_text()) if is_elsewhere(u)]
        assert not elsewhere, (path.name, elsewhere)


# Names of XML, licences in comments, and help texts: no script asks for them.
NAMES_ONLY = re.compile(
    r"https?://(?:www\.w3\.org|github\.com|getbootstrap\.com|docs\.mathjax\.org"
    r"|popper\.js\.org|fontawesome\.com|clipboardjs\.com|developer\.mozilla\.org"
    r"|www\.mathjax\.org|npms\.io|goo\.gl|stackoverflow\.com|codepen\.io"
    r"|pydata-sphinx-theme\.readthedocs\.io|snowball\.tartarus\.org|drafts\.csswg\.org|bugs\.)"
)


def test_scripts_name_no_other_host(site):
    for page in every_page(site)[:1] + list(chapters(site))[:1]:
        for url in page.loaded:
            path = page.path.parent / urllib.parse.urlsplit(url).path
            if path.suffix != ".js":
                continue
            text = path.read_text(encoding="utf-8")
            for found in re.finditer(r"https?://[\w.-]+", text):
                around = text[max(0, found.start() - 60) : found.end() + 40]
                is_name = NAMES_ONLY.match(found[0])
                # MathJax can load what is not in its one file: it never has to.
                is_name = is_name or "mathjax" in path.parts or "speech" in around
                assert is_name, (path.name, around)


def test_what_is_loaded_is_there(site):
    for page in every_page(site):
        for url in page.loaded:
            path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
            assert (page.path.parent / path).is_file(), (page.path.name, url)
    for sheet in site.rglob("*.css"):
        for url in css_urls(sheet.read_text()):
            path = urllib.parse.urlsplit(url).path
            assert (sheet.parent / path).is_file(), (sheet.name, url)


def test_pages_are_light(site):
    for page in every_page(site):
        size = page.path.stat().st_size
        for name in {i["src"] for i in page.images if not i["src"].startswith("data:")}:
            size += (page.path.parent / name).stat().st_size
        assert size <= PAGE_BYTES, (page.path.name, size)


def test_shared_files_are_light(site):
    shared = [*(site / "_static").rglob("*"), *(site / "mathjax").rglob("*"),
              site / "searchindex.js"]  # fmt: skip
    size = sum(path.stat().st_size for path in shared if path.is_file())
    assert 1_000_000 < size <= SHARED_BYTES, size


def test_links_lead_somewhere(site):
    broken = []
    for page in every_page(site):
        for link in page.links:
            if is_elsewhere(link) or link.startswith(("mailto:", "javascript:")):
                continue
            parts = urllib.parse.urlsplit(link)
            target = page.path
            if parts.path:
                target = (page.path.parent / urllib.parse.unquote(parts.path)).resolve()
            anchor = urllib.parse.unquote(parts.fragment)
            if not target.is_file():
                broken.append(f"{page.path.name}: {link}")
            elif anchor and target.suffix == ".html":
                if anchor not in parsed(target).ids:
                    broken.append(f"{page.path.name}: {link}: no such place")
    assert not broken, "\n".join(sorted(set(broken))[:40])


# --- the end of a chapter ------------------------------------------------------------


def article(page: Page) -> str:
    """Return the text of a page as a reader sees it, without menus."""
    text = page.path.read_text(encoding="utf-8")
    text = text.split("<article", 1)[-1].split("</article>", 1)[0]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_chapters_end_with_their_card(site):
    runs = json.loads((book.HOME / "book" / "status.json").read_text())
    for page in chapters(site):
        name = page.path.stem
        assert f"about-{name}" in page.ids
        card = article(page).split("About this page")[-1]
        for part in ("Download", "How to cite", "Run card", "Last verified"):
            assert part in card, (name, part)
        notebook = nbformat.read(book.HOME / "book" / f"{name}.ipynb", as_version=4)
        about = notebook.metadata.scgenlib
        assert f"executed on {about.date}, {about.seconds:.0f} s" in card
        dates = [run["date"] for run in runs if run["chapter"] == name]
        assert f"Last verified {max([*dates, about.date])}" in card
        assert "version " in card and "authors" in card


def test_download_is_the_notebook_of_the_authors(site):
    for page in chapters(site):
        name = f"{page.path.stem}.ipynb"
        assert f"../_sources/book/{name}" in page.links
        theirs = nbformat.read(site / "_sources" / "book" / name, as_version=4)
        ours = nbformat.read(book.HOME / "book" / name, as_version=4)
        assert [c.source for c in theirs.cells] == [c.source for c in ours.cells]
        assert [c.get("outputs") for c in theirs.cells] == [
            c.get("outputs") for c in ours.cells
        ]


def test_functions_of_a_page_are_linked(site):
    for page in chapters(site):
        links = [link for link in page.links if link.startswith("api/")]
        assert len(links) >= 3, page.path.name
    for name in ("methods", "parts", "data", "evaluation", "chapters"):
        page = parsed(site / "book" / "api" / f"{name}.html")
        back = [link for link in page.links if link.startswith("../") and "#" in link]
        assert len(back) > 10, name
        text = page.path.read_text(encoding="utf-8")
        unlinked = re.findall(r'(?<!>)<code class="xref py[^"]*"[^>]*>', text)
        assert not unlinked, (name, unlinked[:3])


# --- without scripts -------------------------------------------------------------


def test_formulas_are_readable_in_the_source(site):
    with_math = 0
    for page in every_page(site):
        text = page.path.read_text(encoding="utf-8")
        text = re.sub(r'<span class="eqno">.*?</span>', "", text, flags=re.S)
        formulas = re.findall(
            r'class="math[^"]*"[^>]*>(.*?)</(?:span|div)>', text, re.S
        )
        with_math += bool(formulas)
        for formula in formulas:
            assert re.search(r"\\[(\[]", formula), (page.path.name, formula[:80])
    assert with_math >= 8


def test_nothing_waits_for_a_script(site):
    for page in every_page(site):
        text = page.path.read_text(encoding="utf-8")
        if "<article" not in text:
            continue
        inner = text.split("<article", 1)[1].split("</article>", 1)[0]
        assert "display:none" not in inner.replace(" ", ""), page.path.name
        assert not page.hidden, (page.path.name, page.hidden)
        assert inner.count("<details") == inner.count("</details>")
        assert inner.count("<details") == inner.count("<summary")


def test_search_works_from_a_folder(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(") and len(index) > 10_000
    page = (site / "search.html").read_text(encoding="utf-8")
    # By a script tag, and not by a request, which a browser refuses for files.
    assert re.search(r'<script[^>]*src="searchindex\.js', page)


# --- the eye and the keyboard ----------------------------------------------------


def test_one_can_skip_to_the_text(site):
    for page in chapters(site):
        assert "#main-content" in page.links and "main-content" in page.ids
        assert page.tags.count("main") == 1 and "nav" in page.tags


def test_style_sheet_minds_keyboard_print_and_phone():
    text = (book.HOME / "_static" / "book.css").read_text()
    assert ":focus-visible" in text and "outline: 3px" in text
    assert "@media print" in text and "@media (max-width: 576px)" in text


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    if len(digits) == 3:
        digits = "".join(d * 2 for d in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_guidelines():
    assert round(contrast("#000", "#ffffff"), 1) == 21.0
    assert round(contrast("#777777", "#ffffff"), 2) == 4.48  # known to fall short


def test_text_stands_out_from_its_ground(site):
    """WCAG AA, 4.5 to 1: code, printed output and lanes, light and dark."""
    code = (site / "_static" / "pygments.css").read_text()
    page = {"light": "#ffffff", "dark": "#14181e"}
    for theme in page:
        rule = rf'html\[data-theme="{theme}"\] \.highlight'
        ground = re.search(rf"{rule} \{{ background: (#\w+); color: (#\w+)", code)
        assert ground
        colours = re.findall(rf"{rule} \.\w+ \{{ color: (#\w+)", code)
        assert len(colours) > 30
        # The theme lays its own surface below some blocks.
        surface = {"light": "#f3f4f5", "dark": "#29313d"}[theme]
        for colour in {*colours, ground[2]}:
            for below in (ground[1], surface):
                assert contrast(colour, below) >= 4.5, (theme, colour, below)
    ours = (book.HOME / "_static" / "book.css").read_text()
    light, dark = re.findall(r"\{([^}]*--lane-core[^}]*)\}", ours)[:2]
    for theme, text in (("light", light), ("dark", dark)):
        for colour in re.findall(r"--lane-\w+: (#\w+)", text):
            assert contrast(colour, page[theme]) >= 4.5, (theme, colour)


# --- in a browser ----------------------------------------------------------------


def in_browser(
    url: str, folder: Path, *options: str, wait: int = 20_000
) -> tuple[str, str]:
    """Return the page after its scripts have run, and what the console said."""
    if CHROMIUM is None:
        pytest.skip("needs chromium: install it to see the pages as a reader does")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={folder / 'profile'}",
         # Any other host is unreachable: a request would show as an error.
         "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
         f"--virtual-time-budget={wait}", *options, "--dump-dom", url],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(said)


@pytest.mark.parametrize("name", ["garage", "data"])
def test_formulas_are_drawn_offline_and_the_console_is_quiet(site, tmp_path, name):
    dom, said = in_browser((site / "book" / f"{name}.html").as_uri(), tmp_path)
    if name == "garage":
        assert dom.count("<mjx-container") > 20
        assert "data-mjx-error" not in dom and "Math input error" not in dom
    assert not re.search(r"error|uncaught|refused|failed", said, re.IGNORECASE), said


def test_search_finds_from_a_folder(site, tmp_path):
    url = (site / "search.html").as_uri() + "?q=overdispersion"
    dom, said = in_browser(url, tmp_path)
    assert "uncaught" not in said.lower(), said
    url = (site / "search.html").as_uri() + "?q=dropout"
    dom, said = in_browser(url, tmp_path / "again")
    found = dom.split('id="search-results"')[-1]
    assert found.count("<li") >= 3, found[:600]
    assert "uncaught" not in said.lower(), said


MEASURE = """<!doctype html><meta charset="utf-8"><body><pre id="result">waiting</pre>
<script>
const names = NAMES;
const done = [];
function next() {
  if (!names.length) {
    document.getElementById("result").textContent = JSON.stringify(done);
    return;
  }
  const name = names.shift();
  const frame = document.createElement("iframe");
  frame.width = 390; frame.height = 800;
  frame.src = name;
  frame.onload = () => setTimeout(() => {
    const page = frame.contentDocument.documentElement;
    const wide = [...frame.contentDocument.querySelectorAll("article *")]
      .filter(e => e.getBoundingClientRect().right > 392)
      .filter(e => {
        for (let p = e.parentElement; p; p = p.parentElement) {
          const o = frame.contentWindow.getComputedStyle(p).overflowX;
          if (p.tagName !== "HTML" && p.tagName !== "BODY" && o !== "visible")
            return false;
        }
        return true;
      }).slice(0, 3).map(e => e.tagName + "." + e.className);
    done.push([name, page.scrollWidth, wide]);
    frame.remove();
    next();
  }, 300);
  document.body.append(frame);
}
next();
</script>"""


def test_pages_fit_a_phone(site, tmp_path):
    names = [(site / "book" / f"{n.removeprefix('book/')}.html").as_uri()
             for n in book.documents()]  # fmt: skip
    probe = tmp_path / "probe.html"
    probe.write_text(MEASURE.replace("NAMES", json.dumps(names)))
    dom, _ = in_browser(probe.as_uri(), tmp_path, "--allow-file-access-from-files",
                        wait=240_000)  # fmt: skip
    text = html.unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)[1])
    measured = json.loads(text)
    assert len(measured) == len(names)
    wide = [m for m in measured if m[1] > 392]
    assert not wide, "\n".join(map(str, wide))


# --- the glossary ----------------------------------------------------------------

TERMS = [
    *("GAN", "auto-encoder", "library size", "condition", "rare type", "batch"),
    *("variational auto-encoder", "precision (generated cells)"),
]


def linked(source: str, page: str = "toy") -> str:
    return pages.Linker(TERMS, page).link(source)


def test_first_use_of_a_term_is_linked():
    assert linked("A GAN and a GAN.") == "A {term}`GAN` and a GAN."
    assert linked("Two GANs, one GAN.") == "Two {term}`GANs <GAN>`, one GAN."
    assert linked("Rare\ntypes here.") == "{term}`Rare types <rare type>` here."
    # The longer term wins, and another form of it was its first use.
    assert linked("A VAE, a variational auto-encoder, an auto-encoder.") == (
        "A {term}`VAE <variational auto-encoder>`, a variational auto-encoder, "
        "an {term}`auto-encoder`."
    )


def test_a_link_of_the_authors_counts():
    text = "{term}`GAN` and GAN; {term}`kinds <rare type>`, a rare type."
    assert linked(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "# GAN\n", "`GAN`\n", "``a `GAN` ``\n", "$GAN$\n", "$$\nGAN\n$$\n",
        "[a GAN](x)\n", "[GAN]{.lane}\n", "| GAN |\n", "<b title='GAN'>\n",
        "(GAN-x)=\n", "{cite:p}`GAN`\n", "https://x.org/GAN\n", "% GAN\n", "WGAN-GP2\n",
        "gan\n", "precision\n", "GAN-like\n",
        "```python\nGAN\n```\n", "```{raw} html\nGAN\n```\n",
        "```{figure} GAN.svg\n:alt: GAN\n```\n", "````\n```\nGAN\n```\nGAN\n````\n",
    ],
)  # fmt: skip
def test_no_link_where_none_belongs(text):
    assert linked(text) == text


def test_prose_in_a_box_is_linked():
    text = "```{admonition} GAN\n:class: tip\nA GAN.\n```\n"
    assert linked(text) == text.replace("A GAN.", "A {term}`GAN`.")
    nested = "````{margin} x\n```python\nGAN\n```\nGAN\n````\n"
    assert linked(nested) == nested.replace("```\nGAN\n````", "```\n{term}`GAN`\n````")


def test_a_word_with_two_meanings_is_linked_on_its_pages_only():
    assert linked("A condition.") == "A condition."
    assert linked("A condition.", "regina") == "A {term}`condition`."
    assert linked("A batch.", "ledger/scatlasvae") == "A {term}`batch`."


def test_lists_of_words_name_entries_of_the_glossary():
    terms = pages.glossary_terms((book.HOME / "book" / "glossary.md").read_text())
    assert set(pages.ONLY) <= set(terms) and set(pages.ALSO.values()) <= set(terms)


def test_chapters_link_their_terms(site):
    for page in chapters(site):
        terms = [link for link in page.links if "glossary.html#term-" in link]
        assert len(terms) >= 5, page.path.name


# --- a public address ------------------------------------------------------------


def test_without_an_address_nothing_needs_one(site):
    config = yaml.safe_load((book.HOME / "_config.yml").read_text())
    if config.get("public_url"):
        pytest.skip("_config.yml names a public address")
    made = pages.switch_on({**config, "public_url": ""}, "")
    assert "public_url" not in made and "launch_buttons" not in made
    assert "repository" not in made and not made["html"]["use_issues_button"]
    for page in chapters(site):
        assert not [u for u in page.links if "mybinder" in u or "issues/new" in u]
        assert "launch-buttons" not in page.path.read_text(encoding="utf-8")


def test_an_address_switches_buttons_on():
    config = {"html": {"use_issues_button": False, "home_page_in_navbar": True}}
    made = pages.switch_on(config, "https://github.com/owner/name/")
    assert made["repository"] == {
        "url": "https://github.com/owner/name",
        "branch": "main",
    }
    assert made["html"]["use_issues_button"] and made["html"]["home_page_in_navbar"]
    assert "binderhub_url" in made["launch_buttons"]
    other = pages.switch_on(config, "https://git.example.org/owner/name")
    assert "launch_buttons" not in other and other["html"]["use_repository_button"]
    assert config["html"]["use_issues_button"] is False


@pytest.mark.parametrize(
    "address", ["example.org", "https://example.org", "http://a/b/c"]
)
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ValueError, match="is not the address of a repository"):
        pages.switch_on({}, address)


def test_an_address_reaches_the_pages(tmp_path, monkeypatch):
    (tmp_path / "_config.yml").write_text('title: x\npublic_url: ""\nhtml: {}\n')
    monkeypatch.setattr(book, "ROOT", tmp_path)
    made = tmp_path / "made.yml"
    monkeypatch.delenv("BOOK_PUBLIC_URL", raising=False)
    book.configure(made)
    assert yaml.safe_load(made.read_text()) == {"title": "x", "html": {}}
    monkeypatch.setenv("BOOK_PUBLIC_URL", "https://github.com/owner/name")
    book.configure(made)
    assert "github.com/owner/name" in made.read_text()
    monkeypatch.setenv("BOOK_PUBLIC_URL", "nowhere")
    with pytest.raises(book.BookError, match="is not the address"):
        book.configure(made)
