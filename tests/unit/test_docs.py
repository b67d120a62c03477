"""What README and docs name exists: links, make targets, commands, options, files; and spelling."""

import dataclasses
import importlib.util
import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from qvlm.config.compose import CONF
from qvlm.config.schema import RunConfig
from qvlm.routes import ROUTES
from tests.helpers.configs import load

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "docs" / "LOG.md"
TOP = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *sorted((ROOT / "qvlm").rglob("README.md"))]
TARGETS = set(
    re.findall(r"^([a-z0-9_-]+)(?: [a-z0-9_-]+)*:.*##", (ROOT / "Makefile").read_text(), re.M)
)
# Words that are spelled in British English, by their beginnings.
BRITISH = re.compile(
    r"\b(\w*(?:normali|optimi|minimi|maximi|initiali|organi|recogni|summari|generali|speciali|quanti"
    r"|regulari|seriali|utili|emphasi|materiali|parametri)s(?:e|ed|es|ing|ation|ations|er)"
    r"|(?:colour|behaviour|neighbour|favour|flavour|honour|labour)\w*"
    r"|(?:centre|metre|fibre|catalogue|artefact|licence|grey|programme|judgement|whilst|maths)s?"
    r"|(?:label|model|cancel|travel|signal|channel)l(?:ed|ing)|analys(?:e|ed|es|ing))\b",
    re.I,
)
OPTION_KEY = "normalise"  # a key that people use in their commands


def fenced(page: Path) -> str:
    """The content of a page's code blocks that have no language, which are commands."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.M | re.S)
    return "\n".join(block for kind, block in blocks if not kind).replace("\\\n", " ")


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """The code spans of a page, outside its code blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> Iterator[str]:
    """The commands of a page, without comments."""
    lines = [line.partition(" #")[0].strip() for line in fenced(page).splitlines()]
    yield from (line for line in [*lines, *spans(page)] if line)


def of_all_pages(pattern: str) -> list[str]:
    """The commands of all pages that a pattern matches, each once."""
    found = [line for page in PAGES for line in commands(page) if re.search(pattern, line)]
    return list(dict.fromkeys(found))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "code", prose(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", sorted((ROOT / "results").glob("*.md")), ids=lambda p: p.name)
def test_the_site_has_every_page_of_results(page: Path) -> None:
    assert f": results/{page.name}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_readme_lists_every_page(page: Path) -> None:
    assert f"](docs/{page.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_make_targets_exist() -> None:
    lines = of_all_pages(r"^make ")
    assert len(lines) > 15
    for line in lines:
        words = [word for word in shlex.split(line)[1:] if "=" not in word and word[0] != "-"]
        assert words, line
        assert set(words) <= TARGETS, line


def test_every_target_is_documented() -> None:
    named = {word for line in of_all_pages(r"^make ") for word in shlex.split(line)[1:]}
    assert TARGETS - named <= {"help", "mini_llava", "mini_moe_llava"}


ROUTE = r"^(?:python -m )?qvlm [a-z][a-z0-9-]*(?: |$)"  # a command line that names a command
# The words before the overrides of a command that runs cells.
PROGRAM = re.compile(r"^(?:.*\brun\.py|qvlm|python -m qvlm)(?: |$)")


def runs() -> list[str]:
    """The command lines that need nothing but this repository."""
    lines = [line for line in of_all_pages(PROGRAM.pattern) if "--config-dir" not in line]
    ours = [line for line in lines if not line.startswith("qvlm lm-eval ")]  # its words are its own
    return [line for line in ours if "=" in line and " -sc " not in line]


@pytest.mark.slow
@pytest.mark.parametrize("line", runs())
def test_commands_compose(line: str) -> None:
    words = shlex.split(PROGRAM.sub("", line, count=1))
    assert {word for word in words if word.startswith("-")} <= {"-m", "--help", "--cfg"}
    route = ROUTES.get(words[0])
    if route is not None and route.keys:
        words = route.expand(words[1:])
    elif route is not None:
        swept = [f"experiment={name}" for name in route.experiments[:1]]
        words = ["-m", *swept, *route.overrides, *words[1:]]
    given = [word for word in words if "=" in word]
    choices = []
    for override in OverridesParser.create().parse_overrides(given):
        assert override.input_line is not None
        key, _, value = override.input_line.partition("=")
        values = value.split(",") if override.is_sweep_override() else [value]
        choices.append([f"{key}={one}" for one in values])
        assert len(values) == 1 or "-m" in words
    for combination in itertools.product(*choices):
        # What the shell would be given a value for.
        load(*(word.replace("NUMBER", "1").replace("=FOLDER", "=folder") for word in combination))


def test_the_readme_shows_the_table() -> None:
    table = pd.read_csv(ROOT / "results" / "table2.csv")
    whole = table[table["class"] == "Avg"].set_index(["model", "method", "bits"])["accuracy"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    header, *rows = re.findall(r"^\| (.*?) *\|$", text.partition("## What it found")[2], re.M)[:9]
    columns = [tuple(cell.split()) for cell in header.split("|")[1:]]
    for name, *cells in ([cell.strip() for cell in row.split("|")] for row in rows[1:]):
        for (model, bits), cell in zip(columns, cells, strict=True):
            if name != "full precision":
                assert float(cell) == whole[model, name, bits]
            elif cell:
                assert float(cell) == whole[model, "FP", "FP"]
    assert len(rows) == 8


def test_there_are_commands_to_compose() -> None:
    assert len(runs()) > 20


@pytest.mark.parametrize("line", of_all_pages(r"\bpython -m (?!pip)"))
def test_modules_exist(line: str) -> None:
    _, _, rest = line.partition("python -m ")
    module, *arguments = shlex.split(rest)
    if module == "qvlm":
        return  # a command line like those of `qvlm`
    if module.endswith(".NAME"):
        module = module.removesuffix(".NAME")
    spec = importlib.util.find_spec(module)
    assert spec is not None, line
    assert spec.origin is not None
    file = Path(spec.origin)
    file = file.with_name("__main__.py") if file.name == "__init__.py" else file
    sources = file.read_text() + (ROOT / "qvlm/tables/command.py").read_text()
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in sources, option


@pytest.mark.parametrize("line", of_all_pages(r"\bpython (experiments|requirements)/"))
def test_scripts_exist(line: str) -> None:
    assert (ROOT / shlex.split(line.partition("python ")[2])[0]).is_file()


@pytest.mark.parametrize("line", of_all_pages(ROUTE))
def test_routes_exist(line: str) -> None:
    name = shlex.split(line.partition("qvlm ")[2])[0]
    assert name in ROUTES, line


def test_there_are_routes_to_look_for() -> None:
    assert len(of_all_pages(ROUTE)) >= 2


@pytest.mark.parametrize("line", of_all_pages(r"^python examples/"))
def test_examples_exist(line: str) -> None:
    assert (ROOT / shlex.split(line)[1]).is_file()


def accepts(key: str) -> bool:
    """Whether a key of the command line is a group, an option, or one of a method or launcher."""
    if any(key in route.keys for route in ROUTES.values()):
        return True
    first, _, rest = key.partition(".")
    if first in {folder.name for folder in CONF.iterdir() if folder.is_dir()} and not rest:
        return True
    if first in ("method", "launcher"):
        files = (CONF / first).glob("*.yaml")
        return any(rest in (yaml.safe_load(file.read_text()) or {}) for file in files)
    kind: Any = RunConfig
    for part in key.split("."):
        found = {field.name: field for field in dataclasses.fields(kind)}
        if part not in found:
            return False
        factory = found[part].default_factory
        kind = factory if dataclasses.is_dataclass(factory) else type(None)
        if kind is type(None):
            return key.endswith(part)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    named = [
        match.group(1)
        for span in spans(page)
        for word in span.split()
        if (match := re.fullmatch(r"([a-z_0-9]+(?:\.[a-z_0-9]+)*)=[^\s()]*", word))
    ]
    named += [
        span
        for span in spans(page)
        if re.fullmatch(
            r"(quantizer|method|model|data|calibration|evaluation|launcher)\.[a-z_0-9.]+", span
        )
    ]
    for key in named:
        assert accepts(key), key


def test_a_wrong_option_is_noticed() -> None:
    assert accepts("quantizer.language.granularity")
    assert accepts("method.veo_eta")
    assert accepts("bits")
    for wrong in ("quantizer.language.grain", "method.gamma", "bitz", "model.size", "seed.x"):
        assert not accepts(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page: Path) -> None:
    folders = "qvlm|tests|conf|docs|experiments|examples|hydra_plugins|requirements"
    for span in spans(page):
        for name in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]*", span):
            if "NAME" not in name:
                assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_short_and_narrow(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    if page != LOG:
        assert len(lines) <= (200 if page.name == "README.md" else 150)
    wide = [line for line in lines if len(line) > 110 and not line.lstrip().startswith("|")]
    assert wide == []


@pytest.mark.parametrize(
    "folder", ["qvlm", "docs", "examples", "experiments", "hydra_plugins", "tests"]
)
def test_spelling_is_american(folder: str) -> None:
    files = [path for kind in ("*.py", "*.md", "*.c") for path in (ROOT / folder).rglob(kind)]
    if folder == "docs":
        files += TOP
    found = [
        f"{path.relative_to(ROOT)}: {match.group(0)}"
        for path in files
        if path != Path(__file__).resolve()
        for match in BRITISH.finditer(path.read_text(encoding="utf-8"))
        if match.group(0) != OPTION_KEY
    ]
    assert found == []


@pytest.mark.parametrize("word", ["colours", "Normalised", "optimisation", "neighbour", "labelled"])
def test_british_spelling_is_noticed(word: str) -> None:
    assert BRITISH.search(f"a {word} b")


@pytest.mark.parametrize(
    "word", ["precise", "promise", "advises", "exercise", "revised", "parallel"]
)
def test_american_words_are_left_alone(word: str) -> None:
    assert not BRITISH.search(f"a {word} b")


def test_nothing_lies_about_at_the_top() -> None:
    """What is tracked beside the folders is what a newcomer is meant to find there."""
    asked = ["git", "ls-files", "--cached", "--", ":(top,glob)*"]
    tracked = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is not a clone")
    files = {".gitignore", "LICENSE", "CITATION.cff", "Makefile", "constraints.txt", "mkdocs.yml"}
    files |= {
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "pyproject.toml",
        "run.py",
        "setup.py",
    }
    assert {*tracked.stdout.split()} == files
