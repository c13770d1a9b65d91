"""The house is in order: lint, format and types are clean, surfaces are frozen, promises hold, words are true.

A frozen surface may change: change the list here in the same commit, and say so in CHANGELOG.md.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import perjoule
from perjoule.cli.main import EXTRAS, app

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

NAMES = [
    "Budget", "Device", "Estimate", "Ledger", "Limit", "Meter", "PerjouleError", "Plan", "Point", "Reading",
    "Recipe", "Result", "Workload", "__version__", "count", "load", "optimize", "plan",
]  # fmt: skip
FACE = {
    "calibrate": "--feed --json --readings --seconds --settle",
    "check-published": "FILE --json",
    "compress": "DIR --bits --calibration --dry-run --dtype --evaluate --expand --field --group --json --method --out "
    "--recipe --resume --seed --sites --spill --window --windows",
    "count": "MODEL --batch --by --checkpoint --context --csv --depth --device --dtype --html --json --optimizer "
    "--phase --shape",
    "devices": "[NAME] --catalogue --json --probe/--no-probe",
    "ledger": "--csv --equivalents --experiment --json",
    "ledger fetch": "PROVIDER --out --since --zone",
    "ledger import": "FILE --experiment",
    "ledger init": "--embodied --folder --hours --life --place --price --pue --water",
    "ledger statement": "--experiment --flops --json --per --unit",
    "ledger when": "LENGTH --hours --json --kwh",
    "measure": "[--] COMMAND --against --cgroup --device --experiment --idle --json --json-file --protocol --repeats "
    "--share --transfer",
    "methods": "[NAME] --json",
    "optimize": "WORKLOAD --energy --evaluations --json --keep --latency --objective --out --resume --seed --size "
    "--sure --target",
    "plan models": "--json",
    "plan serve": "MODEL --compare --device --devices --explain --first --json --latency --load --out --output --place "
    "--places --precision --prompt --pue --rps --search --usd-per-hour --year",
    "plan train": "MODEL --batch --compare --context --data --device --devices --expert --explain --hours --interleave "
    "--json --micro-batch --optimizer --out --pipeline --place --places --policy --pue --recompute --samples --search "
    "--seq --tensor --tokens --trainable --usd-per-hour --within --year --zero",
    "profile": "WORKLOAD --context --depth --html --json --phase --request --seconds",
    "reconcile": "PLAN RUN --json",
    "report": "RUN_FOLDER --json",
    "sweep": "LEVER WORKLOAD --allow-hardware-changes --json --request --rounds --seconds --settings",
}


def tool(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint():
    tool("ruff", "check", "--quiet", ".")


def test_format():
    tool("ruff", "format", "--check", "--quiet", ".")


def test_types():
    tool("mypy")


def test_public_names_are_frozen():
    assert sorted(perjoule.__all__) == NAMES


def leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Commands by their words; a group stands for what is in it, and for itself where it runs without a word."""
    inner = getattr(command, "commands", {})
    if not inner or (name and command.invoke_without_command):
        yield name, command
    for word, below in inner.items():
        yield from leaves(f"{name} {word}".strip(), below)


def surface() -> dict[str, str]:
    """Every command with its arguments and options, as help names them."""
    found = {}
    for name, command in leaves("", get_command(app)):
        arguments = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
        options = ["/".join([p.opts[0], *p.secondary_opts]) for p in command.params if p.param_type_name == "option"]
        found[name] = " ".join([*arguments, *sorted(options)])
    return found


def test_the_command_line_is_frozen():
    assert surface() == FACE


def modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in the file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def culprits(forbidden: set[str]) -> list[str]:
    """Imports of forbidden modules, or of anything inside them."""
    found = []
    for path in SOURCES:
        for line, module in modules(path):
            words = module.split(".")
            if any(".".join(words[:n]) in forbidden for n in range(1, len(words) + 1)):
                found.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    return found


def test_no_file_can_reach_the_network():
    network = (
        "aiohttp asyncio.streams ftplib http httpx huggingface_hub requests smtplib socket ssl urllib.request urllib3"
    )
    found = culprits(set(network.split()))
    assert {line.partition(":")[0] for line in found} == {"src/perjoule/devices/live.py"}, found


def test_only_one_command_reaches_the_file_that_can_reach_the_network():
    assert {line.partition(":")[0] for line in culprits({"perjoule.devices.live"})} == {"src/perjoule/cli/hours.py"}


def test_no_file_can_run_code_from_a_pickle():
    assert not culprits({"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.serialization"})
    calls = re.compile(r"torch\.load\(|weights_only=False|allow_pickle=True|\beval\(|\bexec\(|trust_remote_code=True")
    said = [f"{p.relative_to(ROOT)}:{n}" for p in SOURCES for n, line in enumerate(_code(p), 1) if calls.search(line)]
    assert not said


def _code(path: Path) -> list[str]:
    """Lines without `model.eval()` and its like: methods are not the builtins."""
    return [re.sub(r"\.(eval|exec)\(", ".", line) for line in path.read_text().splitlines()]


def test_the_version_stands_in_one_place():
    version = perjoule.__version__
    holders = [p for p in [*SOURCES, ROOT / "pyproject.toml"] if f'"{version}"' in p.read_text()]
    assert holders == [ROOT / "src" / "perjoule" / "__init__.py"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_extra_the_command_line_names_exists():
    extras = PROJECT["optional-dependencies"]
    assert set(EXTRAS) <= set(extras)
    named = re.compile(r"MissingExtra\.of\([^,]+, \"(\w+)\"\)|perjoule\[(\w+)\]")
    for path in [*SOURCES, *PAGES, *sorted((ROOT / "examples").glob("*.py"))]:
        for found in named.findall(path.read_text()):
            assert "".join(found) in extras, f"{path.name} names the extra {found}"


def test_what_is_pinned_is_what_is_declared():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert "+" not in pins["torch"], "a tag would force one build of torch on everybody"
    declared = [*PROJECT["dependencies"], *(d for extra in PROJECT["optional-dependencies"].values() for d in extra)]
    optional = {"nvidia-ml-py", "amdsmi", "zeus-apple-silicon"}  # not in [dev]: the tests use a stand-in
    for requirement in declared:
        name = re.match(r"[\w.-]+", requirement)[0]
        assert name in {*pins, *optional, "perjoule"}, f"{name} has no pin in constraints.txt"


# Words


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "mailto:")):
            continue
        place, _, anchor = target.partition("#")
        there = (path.parent / place).resolve() if place else path
        assert there.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{path.name}: no heading for {target}"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_page_of_docs_can_be_reached():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, f"docs/index.md does not link {page.name}"


def test_pages_name_no_place_on_a_machine():
    private = re.compile(r"(?<![\w.])/(work|tmp|opt|root|home|mnt|Users)/")
    for path in [*PAGES, *SOURCES, ROOT / "Makefile", ROOT / "constraints.txt"]:
        found = [f"{path.name}:{n}" for n, line in enumerate(path.read_text().splitlines(), 1) if private.search(line)]
        assert not found, found


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_pages_exist(path: Path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for block in re.findall(r"```(?:bash|sh|console)?\n(.*?)```", path.read_text(), flags=re.DOTALL):
        for line in block.splitlines():
            made = re.match(r"(?:\$ )?make (\w+)", line)
            assert not made or made[1] in targets, line
            called = re.match(r"(?:\$ )?perjoule ([\w-]+)(?: (\w+))?", line)
            if called:
                name = next((n for n in (f"{called[1]} {called[2]}", called[1]) if n in FACE), "")
                assert name, line
                options = set(re.findall(r"--\w[\w-]*", line.partition(" -- ")[0].partition("#")[0]))
                known = set(re.findall(r"--\w[\w-]*", FACE[name])) | {"--help", "--debug"}
                assert options <= known, f"{path.name}: {line}"


def snippets(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


def test_the_workload_of_the_readme_is_one(tmp_path: Path):
    workload = next(s for s in snippets(ROOT / "README.md") if "Workload(" in s)
    file = tmp_path / "my_workload.py"
    file.write_text(workload)
    assert len(workload.splitlines()) <= 20
    found = perjoule.load(str(file))
    assert perjoule.count(found).coverage == 1


def test_the_new_form_of_the_guide_passes_its_own_test(tmp_path: Path):
    """CONTRIBUTING.md's worked example, as written, against the conformance suite that it tells people to use."""
    form, test = [s for s in snippets(ROOT / "CONTRIBUTING.md") if "Shift" in s][:2]
    (tmp_path / "shift.py").write_text(form)
    (tmp_path / "test_shift.py").write_text(test.replace("perjoule.compress.forms.shift", "shift"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=prepend", str(tmp_path)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
