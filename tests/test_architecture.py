"""The import rule of the design, as a test: a stage imports itself and lower layers only; nothing forms a cycle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

LAYERS = [
    "core",
    "count devices",
    "plan measure",
    "train",
    "compress",
    "export",
    "search",
    "serve doors",
    "report",
    "cli testing",
]
RANK = {stage: rank for rank, stages in enumerate(LAYERS) for stage in stages.split()}
ROOT = Path(__file__).parents[1] / "src" / "perjoule"
FILES = {
    ".".join(("perjoule", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p
    for p in sorted(ROOT.rglob("*.py"))
}
HEAVY = {"torch", "onnx", "onnxruntime", "openvino", "transformers", "sklearn", "pynvml", "onnxscript", "safetensors"}


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) for every import in the file: top-level, lazy and TYPE_CHECKING alike."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write perjoule.<stage>"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((node.lineno, full if full in FILES else node.module))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
    return found


def ours(path: Path) -> list[tuple[int, str]]:
    return [(line, name) for line, name in imports(path) if name.split(".")[0] == "perjoule"]


def test_imports_only_point_down():
    wrong = []
    for name, path in FILES.items():
        if name in ("perjoule", "perjoule.__main__"):
            continue  # the public face may import any stage
        stage = name.split(".")[1]
        assert stage in RANK, f"{path}: '{stage}' is no stage of the design"
        for line, target in ours(path):
            other = target.split(".")[1] if "." in target else None
            version = other is None and stage == "cli"  # `from perjoule import __version__`
            if other != stage and not version and (other is None or RANK[other] >= RANK[stage]):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {stage} may not import {target}")
    assert not wrong, "\n".join(wrong)


def test_no_cycles():
    graph = {name: {t for _, t in ours(path)} - {name, "perjoule"} for name, path in FILES.items()}
    assert list(TopologicalSorter(graph).static_order())  # CycleError names the modules


def test_core_needs_no_heavy_library():
    for name, path in FILES.items():
        if name.split(".")[1:2] == ["core"]:
            heavy = [t for _, t in imports(path) if t and t.split(".")[0] in HEAVY]
            assert not heavy, f"{name} imports {heavy}"


def test_no_long_file_and_no_drawer():
    for name, path in FILES.items():
        assert len(path.read_text().splitlines()) <= 500, f"{name}: split it"
        assert path.stem not in {"utils", "util", "helpers", "common", "misc"}, f"{name}: name what it does"
