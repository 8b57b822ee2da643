"""The house rules: imports run one way, heavy modules stay out, only the command line prints."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import alpacache

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"cache_store": {"alpacache", "cli", "torch", "transformers"}, "alpacache": {"cli"}, "cli": set()}


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports(path):
    """(module, names) of every import statement, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, set()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module, {alias.name for alias in node.names}


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_run_one_way(package):
    for path in modules(package):
        for module, _ in imports(path):
            assert module.split(".")[0] not in FORBIDDEN[package], f"{path} imports {module}"


def test_only_the_model_package_imports_model_classes():
    allowed = {ROOT / "alpacache/alpamayo", ROOT / "alpacache/demo"}
    for path in modules("alpacache"):
        if not allowed & set(path.parents):
            assert all(module.split(".")[0] != "transformers" for module, _ in imports(path)), path


def test_only_the_command_line_prints():
    for path in modules("alpacache") + modules("cache_store"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), f"{path}:{node.lineno} prints"


def loaded_by(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_cache_store_imports_no_torch():
    found = loaded_by("import sys, cache_store; print(*sys.modules)")
    assert "cache_store" in found
    assert not {"torch", "transformers", "alpacache"} & found


@pytest.mark.parametrize("package", ["alpacache", "alpacache.metrics"])
def test_a_package_that_imports_on_first_use_loads_nothing_before(package):
    found = loaded_by(f"import sys, {package}; print(*sys.modules)")
    assert package in found
    assert not {"torch", "numpy", "transformers", "cache_store"} & found


def test_names_of_the_documented_contract_are_importable():
    from alpacache import EvalConfig, ExportConfig, ExtractConfig, ProbeConfig, TrainConfig
    from alpacache.metrics import corner_distance, extra_metrics, min_ade

    configs = (EvalConfig, ExportConfig, ExtractConfig, ProbeConfig, TrainConfig)
    assert all(config.__name__ in alpacache.__all__ for config in configs)
    assert min_ade([[[1.0, 2.0, 0.0]] * 64], [[1.0, 0.0, 0.0]] * 64)["min_ade"] == 2.0
    assert {corner_distance.__module__, extra_metrics.__module__} == {"alpacache.metrics.paths"}
    for name in alpacache.__all__:
        assert getattr(alpacache, name) is not None
    with pytest.raises(AttributeError, match=r"module 'alpacache\.metrics' has no attribute 'min_ada'"):
        alpacache.metrics.min_ada  # noqa: B018


def test_help_is_quick_and_loads_nothing_heavy():
    code = "import sys; from cli.main import app\ntry: app(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    found = loaded_by(code)
    assert "cli.main" in found
    assert not {"torch", "transformers", "zarr", "datasets", "matplotlib", "scipy"} & found
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "cli.main", "--help"], capture_output=True, check=True, cwd=ROOT)
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1.0


def test_nothing_unpickles_or_trusts_remote_code():
    for package in FORBIDDEN:
        for path in modules(package):
            text = path.read_text()
            assert "trust_remote_code" not in text, path
            assert "torch.load" not in text, path
            assert all(module.split(".")[0] not in ("pickle", "dill", "joblib") for module, _ in imports(path)), path
