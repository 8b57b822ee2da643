"""The house rules: the order of the rooms, heavy modules stay out, only the command line prints."""

import ast
import resource
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import alpacache

ROOT = Path(__file__).parents[1]
PACKAGES = ("alpacache", "cache_store", "cli")

# From top to bottom: a room imports from lower lines alone. Rooms of one line do not know each other.
ORDER = (
    ("cli",),
    ("alpacache.demo",),
    ("alpacache.converters", "alpacache.driver", "alpacache.evaluation", "alpacache.exporting"),
    ("alpacache.checks", "alpacache.extraction", "alpacache.training"),
    ("alpacache.inference", "alpacache.planning"),
    ("alpacache.cached_samples",),
    ("alpacache.alpamayo",),
    ("alpacache.distributed", "alpacache.metrics", "alpacache.pictures", "alpacache.prefix", "alpacache.sources"),
    ("alpacache.layer_choice", "alpacache.randomness"),
    ("alpacache.driving", "alpacache.gpu"),
    ("alpacache.config", "alpacache.durable"),
    ("alpacache.directory_lock", "alpacache.hub", "alpacache.torchrun"),
    (
        "alpacache",
        "alpacache.errors",
        "alpacache.finite",
        "alpacache.flow_matching",
        "alpacache.interrupt",
        "alpacache.progress",
        "alpacache.regular_file",
        "alpacache.strict_json",
    ),
    ("alpacache.masking", "cache_store"),
)
LEVEL = {room: level for level, rooms in enumerate(reversed(ORDER)) for room in rooms}


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


@cache
def tree(path):
    return ast.parse(path.read_text())


def imports(path):
    """(module, names) of every import statement, wherever it stands; relative ones, which `cli` alone has, resolved."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, set()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            assert node.level == 0 or path.parent == ROOT / "cli", f"{path} has a relative import"
            yield (node.module if node.level == 0 else "cli"), names


def room_of(module):
    """The folder a module stands in; a module right below `alpacache` is a room of its own."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "alpacache" else parts[0]


def imported_rooms(path):
    """Rooms that a file imports from."""
    for module, names in imports(path):
        if (
            module == "alpacache"
        ):  # `from alpacache import randomness` names a room, `from alpacache import extract` does not
            yield from (f"alpacache.{name}" if f"alpacache.{name}" in LEVEL else "alpacache" for name in names)
        elif module.split(".")[0] in PACKAGES:
            yield room_of(module)


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_from_lower_rooms_alone(package):
    for path in modules(package):
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        for other in imported_rooms(path):
            assert other == room or LEVEL[other] < LEVEL[room], f"{path} imports {other}, which is not below {room}"


def test_every_module_stands_in_a_room():
    folders = {path.parent for path in modules("alpacache")} - {ROOT / "alpacache"}
    single = {path.stem for path in (ROOT / "alpacache").glob("*.py")} - {"__init__"}
    rooms = {
        f"alpacache.{name}" for name in single | {path.relative_to(ROOT / "alpacache").parts[0] for path in folders}
    }
    assert rooms == {room for room in LEVEL if room.startswith("alpacache.")}


def test_modules_do_not_import_each_other_in_circles():
    graph = {}
    for package in PACKAGES:
        for path in modules(package):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            targets = set()
            for node in tree(path).body:  # what is imported when the module is
                if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    for alias in node.names:
                        full = f"{node.module}.{alias.name}"
                        is_module = (ROOT / full.replace(".", "/")).with_suffix(".py").exists()
                        targets.add(full if is_module else node.module)
            graph[name] = targets
    done, on_the_way = set(), []

    def visit(name):
        if name in done or name not in graph:
            return
        assert name not in on_the_way, " -> ".join([*on_the_way[on_the_way.index(name) :], name])
        on_the_way.append(name)
        for target in sorted(graph[name] - {name}):
            visit(target)
        on_the_way.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_class_names_are_unique():
    """A name that a reader has met means the same in every room."""
    homes = {}
    for path in [path for package in PACKAGES for path in modules(package)]:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_code_stands_in_the_folders_that_contributing_names():
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    folders = {path.name for path in ROOT.glob("[!.]*/") if any(path.rglob("*.py"))} - ignored
    assert folders == {*PACKAGES, "benchmarks", "docs_build", "tests"}


def test_the_wheel_has_every_package_and_none_that_is_called_cli():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for package in ("alpacache", "cache_store") for path in modules(package)}
    assert setuptools["package-dir"] == {"alpacache_cli": "cli"}
    assert set(setuptools["packages"]) == {"alpacache_cli"} | {".".join(p.relative_to(ROOT).parts) for p in folders}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_only_the_model_package_imports_model_classes():
    for path in modules("alpacache"):
        if ROOT / "alpacache/alpamayo" not in path.parents:
            assert all(module.split(".")[0] != "transformers" for module, _ in imports(path)), path


def test_only_the_rooms_of_codecs_know_their_kinds():
    """The next codec is one class there and one in torch: nothing else asks which one it is."""
    from cache_store.kv.registry import KINDS

    kinds = {kind.__name__ for kind in KINDS.values()}
    rooms = {ROOT / "cache_store/kv", ROOT / "alpacache/prefix"}
    for path in [path for package in PACKAGES for path in modules(package) if path.parent not in rooms]:
        if path != ROOT / "cache_store/__init__.py":
            assert not any(kinds & names for _, names in imports(path)), path


def test_only_the_command_line_prints():
    for path in modules("alpacache") + modules("cache_store"):
        for node in ast.walk(tree(path)):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), f"{path}:{node.lineno} prints"


def loaded_by(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.splitlines()[-1].split())  # what a command prints before may name them


def test_cache_store_imports_no_torch():
    found = loaded_by("import sys, cache_store; print(*sys.modules)")
    assert "cache_store" in found
    assert not {"torch", "transformers", "alpacache"} & found


@pytest.mark.parametrize("package", ["alpacache", "alpacache.metrics"])
def test_a_package_that_imports_on_first_use_loads_nothing_before(package):
    loaded = loaded_by(f"import sys, {package}; print(*sys.modules)")
    assert package in loaded
    assert not {"torch", "numpy", "transformers", "cache_store"} & loaded


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


def test_help_loads_nothing_heavy():
    code = "import sys; from cli.main import app\ntry: app(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    found = loaded_by(code)
    assert "cli.main" in found
    assert not {"torch", "transformers", "zarr", "datasets", "matplotlib", "scipy", "numpy", "cache_store"} & found


def cpu_seconds(*arguments):
    """Least CPU time of a Python process, of three: what else the machine does counts little."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(seconds)


@pytest.mark.ci
def test_help_costs_less_than_importing_torch():
    assert cpu_seconds("-m", "cli.main", "--help") < 0.7 * cpu_seconds("-c", "import torch")


@pytest.mark.system
@pytest.mark.parametrize(
    "arguments", [["info", "no-such-store"], ["verify", "no-such-store"], ["check", "--help"], ["train", "--help"]]
)
def test_commands_that_need_no_torch_do_not_load_it(arguments):
    code = f"import sys; from cli.main import main\nsys.argv = ['alpacache', *{arguments!r}]\n"
    code += "try: main()\nexcept SystemExit: pass\nprint('modules:', *sys.modules)"
    loaded = loaded_by(code)
    assert "cli.main" in loaded
    assert not {"torch", "transformers", "datasets", "matplotlib"} & loaded


def test_nothing_unpickles_or_trusts_remote_code():
    for package in PACKAGES:
        for path in modules(package):
            text = path.read_text()
            assert "trust_remote_code" not in text, path
            assert "torch.load" not in text, path
            assert all(module.split(".")[0] not in ("pickle", "dill", "joblib") for module, _ in imports(path)), path
