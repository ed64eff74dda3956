"""Every way into timm finds our models, and no fault of ours breaks torch or timm.

The package under test is a wheel, built once and installed into a virtual environment that borrows
all other packages from this one, so that the metadata is real and no checkout is on the path.

Importing torch and timm takes ten seconds. Most code therefore runs in a fork of an interpreter
that has imported torch, torchvision and what else timm imports; the slow tests run the same orders
in fresh interpreters.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import hatchling.build
import pytest
import timm
import torch
from packaging.version import Version
from timm.models import save_for_hf

from timm_xformers.replace import replace_attention, replacement_of
from timm_xformers.weights import read_manifest

ROOT = Path(__file__).resolve().parent.parent
LISTED = "import timm; assert 'vix_softmax' in timm.list_models('vix*'), 'not registered'"
NOT_LISTED = "import timm; assert not timm.list_models('vix*'), 'registered'"
# What only training and exporting import.
EXTRAS = [
    "accelerate",
    "datasets",
    "linformer",
    "local_attention",
    "matplotlib",
    "nystrom_attention",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "optuna",
    "performer_pytorch",
    "sklearn",
    "tensorboard",
    "transformers",
]
AUTOLOAD_OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}

# What a program may do before it asks timm for our models. These do not name us, and work where
# torch loads entry points,
WITHOUT_US = {
    "timm": "import timm",
    "torch": "import torch, timm",
    "torchvision": "import torchvision, timm",
    "accelerate": "import accelerate, timm",
    "timm.models": "import timm.models",
    "create_model": "from timm.models import create_model; create_model('vix_softmax')",
    "timm.layers": "import timm.layers",
    "vision_transformer": "import timm.models.vision_transformer",
    "_registry": "import timm.models._registry",
    "thread": """
        import threading
        thread = threading.Thread(target=__import__, args=("timm",))
        thread.start()
        thread.join()
    """,
    "reload": """
        import importlib, sys, timm.models
        importlib.reload(timm.models)
        assert sum(hasattr(f, "timm_models_plugins") for f in sys.meta_path) == 1
    """,
    "both purged": """
        import sys, timm
        for name in list(sys.modules):
            if name.partition(".")[0] in ("timm", "timm_xformers"):
                del sys.modules[name]
    """,
    "look at the spec": """
        import importlib.resources, importlib.util, inspect, pkgutil
        spec = importlib.util.find_spec("timm.models")
        assert "create_model" in spec.loader.get_source("timm.models")
        import timm.models
        assert "create_model" in inspect.getsource(timm.models)
        assert importlib.resources.files("timm.models").joinpath("vision_transformer.py").is_file()
        assert "vision_transformer" in {m.name for m in pkgutil.iter_modules(timm.models.__path__)}
        assert type(timm.models.__loader__).__module__ != "timm_xformers.registration"
    """,
    "forked workers": """
        import timm
        from torch.utils.data import DataLoader
        class Counts(list):
            def __getitem__(self, index):
                return len(timm.list_models("vix*"))
        loader = DataLoader(Counts(range(4)), num_workers=2, multiprocessing_context="fork")
        assert all(int(n) == len(timm.list_models("vix*")) for n in loader)
    """,
}
# these do, and work everywhere.
WITH_US = {
    "package": "import timm_xformers",
    "package after timm": "import timm, timm_xformers",
    "public name": "import timm_xformers; timm_xformers.list_attention",
    "package before timm": "import timm_xformers, timm",
    "package reloaded": "import importlib, timm_xformers; importlib.reload(timm_xformers)",
    "our models": "import timm_xformers.models",
    "our entry point": "from timm_xformers.models.vix import vix_softmax; vix_softmax()",
    "our layers": "import timm_xformers.layers",
    "one of our layers": "import timm_xformers.layers.performer",
    "replacement": "import timm_xformers.replace.replacing",
    "maps": "from timm_xformers import attention_map",
}
ORDERS = {**WITHOUT_US, **WITH_US}


@dataclass
class Result:
    """How a piece of code ended in another process."""

    code: int
    output: str

    def check(self) -> str:
        assert self.code == 0, self.output
        return self.output


@dataclass
class Environment:
    """A virtual environment with everything that this one has, except our package."""

    folder: Path
    python: Path
    site: Path

    @classmethod
    def create(cls, folder: Path) -> "Environment":
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(subprocess.check_output([python, "-c", where], text=True).strip())
        for path in map(Path, sys.path):
            if path.name in ("site-packages", "dist-packages") and path.is_dir():
                for entry in path.iterdir():
                    ours = "timm_xformers" in entry.name or entry.name.startswith("__editable__")
                    link = site / entry.name
                    if not ours and entry.suffix != ".pth" and not os.path.lexists(link):
                        link.symlink_to(entry)
        (folder / "empty").mkdir()
        return cls(folder, python, site)

    def pip(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python"]
        result = subprocess.run(
            [*command, self.python, *arguments], capture_output=True, text=True, env=clean_environ()
        )
        assert result.returncode == 0, result.stdout + result.stderr

    def install(self, what: Path, *options: str) -> "Environment":
        offline = ("--no-deps", "--no-index", "--no-build-isolation", "--no-compile")
        self.pip("install", *offline, *options, what)
        return self

    def run(self, code: str, *flags: str, environ: dict[str, str] | None = None) -> Result:
        """Run code in a fresh interpreter, away from the checkout."""
        result = subprocess.run(
            [self.python, *flags, "-c", textwrap.dedent(code)],
            cwd=self.folder / "empty",
            env=clean_environ(environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return Result(result.returncode, result.stdout)


class ForkServer:
    """An interpreter that has imported what timm imports, and forks for each piece of code.

    It has imported torch with autoload off. The forks with autoload call what is the end of
    ``import torch`` there.
    """

    LOOP = """
        import gc, json, os, sys, torch, torchvision, safetensors.torch, yaml
        from huggingface_hub import HfApi, hf_hub_download
        assert not {"timm", "timm_xformers"} & sys.modules.keys()
        gc.freeze()
        print("ready", flush=True)
        for line in sys.stdin:
            code, log, autoload = json.loads(line)
            child = os.fork()
            if not child:
                status = 1
                output = os.open(log, os.O_WRONLY | os.O_CREAT)
                os.dup2(output, 1), os.dup2(output, 2)
                try:
                    if autoload:
                        del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
                        torch._import_device_backends()
                    exec(code, {"__name__": "__main__"})
                    status = 0
                except BaseException:
                    import traceback
                    traceback.print_exc()
                finally:
                    sys.stdout.flush(), sys.stderr.flush()
                    os._exit(status)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """

    def __init__(self, env: Environment) -> None:
        self.folder = env.folder / "logs"
        self.folder.mkdir()
        self.count = 0
        self.process = subprocess.Popen(
            [env.python, "-c", textwrap.dedent(self.LOOP)],
            cwd=env.folder / "empty",
            env=clean_environ(AUTOLOAD_OFF),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, code: str, autoload: bool = True) -> Result:
        self.count += 1
        log = self.folder / str(self.count)
        self.process.stdin.write(json.dumps([textwrap.dedent(code), str(log), autoload]) + "\n")
        self.process.stdin.flush()
        return Result(int(self.process.stdout.readline()), log.read_text())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=300)


def clean_environ(extra: dict[str, str] | None = None) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TORCH_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", **(extra or {})}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Folder with an sdist of the checkout and the wheel that is built from that sdist.

    By the hooks that every tool calls, in this process.
    """
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        sdist = folder / hatchling.build.build_sdist(str(folder))
        subprocess.run(["tar", "xf", sdist, "-C", folder], check=True)
        patch.chdir(folder / sdist.name.removesuffix(".tar.gz"))
        hatchling.build.build_wheel(str(folder))
    return folder


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    """Unpacked, as installers do with a wheel of modules; pip is tried below."""
    env = Environment.create(tmp_path_factory.mktemp("installed"))
    zipfile.ZipFile(wheel).extractall(env.site)
    return env


@pytest.fixture
def bare(tmp_path) -> Environment:
    return Environment.create(tmp_path / "bare")


@pytest.fixture(scope="module")
def forks(installed):
    server = ForkServer(installed)
    yield server
    server.close()


@pytest.fixture(scope="module")
def forks_without_autoload(forks):
    return SimpleNamespace(run=functools.partial(forks.run, autoload=False))


def declare_plugin(folder: Path, name: str, source: str) -> None:
    """Write a module and the metadata of a distribution that declares it to timm."""
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[timm.models]\n{name} = {name}\n")


@pytest.mark.parametrize("order", ORDERS)
def test_registered_after_torch(forks, order):
    output = forks.run(f"{textwrap.dedent(ORDERS[order])}\n{LISTED}").check()
    assert "RuntimeWarning" not in output


@pytest.mark.parametrize("order", WITH_US)
def test_registered_by_explicit_import_without_autoload(forks_without_autoload, order):
    output = forks_without_autoload.run(f"{textwrap.dedent(WITH_US[order])}\n{LISTED}").check()
    assert "RuntimeWarning" not in output


def test_nothing_happens_without_autoload_and_import(forks_without_autoload):
    forks_without_autoload.run(NOT_LISTED).check()


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_registered_in_fresh_interpreter(installed, order):
    output = installed.run(f"{textwrap.dedent(ORDERS[order])}\n{LISTED}").check()
    assert "RuntimeWarning" not in output


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["-I"], id="isolated"),
        pytest.param(["-OO"], id="optimised", marks=pytest.mark.slow),
        pytest.param(["-W", "error"], id="warnings are errors", marks=pytest.mark.slow),
    ],
)
def test_import_timm_alone_under_flags(installed, flags):
    code = "import timm; raise SystemExit(0 if timm.list_models('vix*') else 3)"
    assert "RuntimeWarning" not in installed.run(code, *flags).check()


def test_hook_imports_neither_torch_nor_timm(installed):
    installed.run("""
        import sys, timm_xformers
        from timm_xformers.registration import install
        install()
        heavy = {"torch", "timm", "accelerate", "numpy", "typing"} & sys.modules.keys()
        assert heavy <= {"typing"}, heavy
        assert sum(hasattr(f, "timm_models_plugins") for f in sys.meta_path) == 1
        assert "list_attention" in dir(timm_xformers)
    """).check()


def test_hook_costs_little_beside_import_torch(installed):
    # A ratio within one process, in processor time: a slow or busy machine slows both alike. What
    # torch has done before it asks for entry points does not count.
    code = """
        import os, time
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        start = time.process_time()
        import torch
        torch_s = time.process_time() - start
        import importlib.metadata, importlib.util, sys, warnings
        importlib.util.find_spec("torch")
        points = importlib.metadata.entry_points(group="torch.backends")
        (point,) = [point for point in points if point.name == "timm_xformers"]
        assert "timm_xformers" not in sys.modules
        start = time.process_time()
        point.load()()
        print((time.process_time() - start) / torch_s)
    """
    ratios = []
    while min(ratios, default=1) > 1 / 500 and len(ratios) < 3:
        ratios.append(float(installed.run(code).check()))
    assert min(ratios) <= 1 / 500, ratios


def test_pickled_model_finds_its_class(forks, tmp_path):
    saved = str(tmp_path / "model.pt")
    forks.run(
        f"import timm, torch; torch.save(timm.create_model('vix_softmax'), {saved!r})"
    ).check()
    forks.run(f"import torch; torch.load({saved!r}, weights_only=False)").check()


def test_models_need_no_extra(forks):
    forks.run(f"""
        import sys; sys.modules.update(dict.fromkeys({EXTRAS}))
        import timm, timm_xformers.models
        assert timm.create_model('vix_softmax', num_classes=3).num_classes == 3
        import timm_xformers; assert timm_xformers.list_attention()
        assert 'timm_xformers.layers.performer.triton.blocks' not in sys.modules
    """).check()


def test_weights_load_without_network_where_only_timm_is_imported(forks):
    entries = read_manifest()
    forks.run(f"""
        import socket, sys
        def refuse(*_):
            raise AssertionError("a connection")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        import timm
        assert sorted(timm.list_pretrained({sorted(entries)})) == {sorted(entries)}
        for name in {sorted(entries)}:
            timm.create_model(name, pretrained=True)
        assert "timm_xformers.training" not in sys.modules
    """).check()


def test_replaced_model_loads_where_only_timm_is_imported(forks, tmp_path):
    name, size = "vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 32}
    model = timm.create_model(name, **size, num_heads=2).eval()
    replace_attention(model, {"1": {"name": "performer_softmax_m16", "num_features": 12}})
    told = None
    if Version(timm.__version__) < Version("1.0.31"):  # writes no argument that it is not told
        told = {**size, "num_heads": 2, "architecture": name, "replacement": replacement_of(model)}
    save_for_hf(model, tmp_path, model_args=told)
    output = forks.run(f"""
        import timm, torch
        model = timm.create_model('local-dir:{tmp_path}', pretrained=True).eval()
        print(model(torch.ones(1, 3, 32, 32)).flatten().tolist())
    """).check()
    wanted = model(torch.ones(1, 3, 32, 32)).flatten()
    torch.testing.assert_close(torch.tensor(json.loads(output)), wanted)


def test_our_failure_is_one_warning(forks):
    output = forks.run("""
        import sys
        sys.modules["timm_xformers.models"] = None  # any import of it fails
        import timm
        timm.create_model("test_vit")
        import timm_xformers
    """).check()
    assert output.count("RuntimeWarning") == 1
    assert "timm_xformers.models could not be imported" in output


def test_failure_under_warnings_as_errors_still_imports_timm(forks):
    output = forks.run("""
        import sys, warnings
        warnings.simplefilter("error", RuntimeWarning)
        sys.modules["timm_xformers.models"] = None
        import timm
        assert timm.is_model("test_vit")
    """).check()
    assert output.count("RuntimeWarning: timm_xformers.models could not be imported") == 1


@pytest.mark.parametrize("broken", [False, True], ids=["sound", "broken"])
def test_other_plugins_load_with_ours(forks, tmp_path, broken):
    source = """
        from timm.models import register_model
        @register_model
        def other_model(pretrained=False, **kwargs): ...
    """
    declare_plugin(tmp_path, "other_plugin", "1 / 0" if broken else source)
    output = forks.run(
        f"import sys; sys.path.append({str(tmp_path)!r})\n{LISTED}\n"
        f"assert timm.is_model('other_model') is {not broken}"
    ).check()
    assert output.count("RuntimeWarning: other_plugin could not be imported") == broken
    assert ("ZeroDivisionError" in output) is broken


def test_damaged_metadata_elsewhere_costs_only_the_other_plugins(forks):
    output = forks.run(f"""
        import importlib.metadata
        def fail(**selection): raise ValueError("damaged")
        importlib.metadata.entry_points = fail
        {LISTED}
    """).check()
    assert output.count("RuntimeWarning") == 1
    assert "ValueError: damaged" in output


def test_stale_plugin_is_named(forks):
    output = forks.run(f"""
        import sys, timm
        for name in list(sys.modules):
            if name.partition(".")[0] == "timm":
                del sys.modules[name]
        {NOT_LISTED}
    """).check()
    assert output.count("RuntimeWarning") == 1
    assert "timm_xformers.models was imported for an earlier import of timm" in output


def test_install_reports_instead_of_raising(forks):
    output = forks.run("""
        import sys, timm_xformers.registration as registration
        sys.meta_path = None
        registration.install()
    """).check()
    assert output.count("RuntimeWarning: timm_xformers could not hook into `import timm`") == 1


@pytest.mark.parametrize("action", ["default", "error"])
def test_names_of_timm_are_never_overwritten(forks, action):
    output = forks.run(f"""
        import sys, timm, types, warnings
        from timm_xformers.models._register import register_model
        warnings.simplefilter({action!r})
        original = timm.model_entrypoint("resnet18")
        cfg = timm.get_pretrained_cfg("resnet18")
        family = types.ModuleType("family")
        sys.modules["family"] = family
        exec("def resnet18(pretrained=False, **kwargs): ...", vars(family))
        exec("def new_name(pretrained=False, **kwargs): ...", vars(family))
        assert register_model(family.resnet18) is family.resnet18
        assert timm.model_entrypoint("resnet18") is original
        assert timm.get_pretrained_cfg("resnet18") == cfg
        assert register_model(family.new_name) is timm.model_entrypoint("new_name")
        assert family.__all__ == ["new_name"]
    """).check()
    assert output.count("RuntimeWarning: timm already has a model 'resnet18'") == 1


def test_no_name_of_ours_was_taken(forks):
    forks.run("""
        import importlib, pkgutil, timm, timm_xformers.models as ours
        for info in pkgutil.iter_modules(ours.__path__):
            module = importlib.import_module(f"{ours.__name__}.{info.name}")
            for name in timm.list_models(module=info.name):
                assert timm.model_entrypoint(name).__module__ == module.__name__
    """).check()


def test_wheel_built_from_the_sdist_holds_what_it_should(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "timm_xformers/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"timm_xformers"}
    assert not [name for name in names if "test" in name.rpartition("/")[2]]

    recipes = ROOT / "train_scripts" / "recipes"
    package = [p for p in (ROOT / "timm_xformers").rglob("*.*") if p.suffix != ".pyc"]
    ours = {p.relative_to(ROOT).as_posix() for p in package if p.is_file()}
    shipped = {p.relative_to(recipes).as_posix() for p in recipes.rglob("*.yaml")}
    assert shipped
    ours |= {f"timm_xformers/recipes/{name}" for name in shipped}
    assert {name for name in names if name.startswith("timm_xformers/")} == ours


def test_uninstalled_package_leaves_torch_and_timm_alone(wheel, bare):
    bare.install(wheel).pip("uninstall", "--yes", "timm-xformers")
    assert not list(bare.site.glob("timm_xformers*"))
    assert bare.run("import torch, sys; assert 'timm_xformers' not in sys.modules").check() == ""


def test_without_metadata_the_import_registers(forks_without_autoload):
    forks_without_autoload.run(f"""
        import importlib.metadata
        importlib.metadata.entry_points = lambda **selection: []
        {NOT_LISTED}
        import timm_xformers
        {LISTED}
    """).check()


@pytest.mark.slow
def test_vendored_copy_registers_when_imported(wheel, bare):
    vendor = bare.folder / "vendor"
    zipfile.ZipFile(wheel).extractall(vendor)
    shutil.rmtree(next(vendor.glob("*.dist-info")))
    code = f"{NOT_LISTED}\nimport timm_xformers\n{LISTED}"
    bare.run(code, environ={"PYTHONPATH": str(vendor)}).check()


def test_moved_editable_checkout_is_named_by_torch(bare, tmp_path):
    checkout = tmp_path / "checkout"
    for part in ("timm_xformers", "train_scripts"):
        shutil.copytree(ROOT / part, checkout / part)
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, checkout)
    bare.install(checkout, "--editable")
    where = bare.run("import timm_xformers; print(timm_xformers.__file__)").check().strip()
    assert where == str(checkout / "timm_xformers" / "__init__.py")

    checkout.rename(tmp_path / "elsewhere")
    failed = bare.run("import torch")
    assert failed.code != 0
    assert "Failed to load the backend extension: timm_xformers" in failed.output
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in failed.output


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdist", "editable", "zipped wheel"])
def test_registered_however_it_was_installed(bare, dist, wheel, kind):
    if kind == "sdist":
        bare.install(next(dist.glob("*.tar.gz")))
    elif kind == "editable":
        bare.install(ROOT, "--editable")
    environ = {"PYTHONPATH": str(wheel)} if kind == "zipped wheel" else None
    bare.run(LISTED, environ=environ).check()


@pytest.mark.slow
def test_registered_on_both_ranks(installed):
    script = installed.folder / "script.py"
    script.write_text(f"{LISTED}\nimport os; print('rank', os.environ['RANK'], 'lists')\n")
    launch = f"""
        import sys, runpy
        sys.argv = ["torchrun", "--nproc_per_node=2", "--master_port=0", {str(script)!r}]
        runpy.run_module("torch.distributed.run", run_name="__main__")
    """
    output = installed.run(launch, environ={"OMP_NUM_THREADS": "1"}).check()
    assert "rank 0 lists" in output
    assert "rank 1 lists" in output


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_registered_in_workers_that_start_anew(installed, method):
    script = installed.folder / "workers.py"
    script.write_text(
        textwrap.dedent(f"""
        from torch.utils.data import DataLoader

        class Counts:
            def __len__(self):
                return 1

            def __getitem__(self, index):
                import timm
                return len(timm.list_models("vix*"))

        if __name__ == "__main__":
            (count,) = DataLoader(Counts(), num_workers=1, multiprocessing_context={method!r})
            assert int(count) > 0
        """)
    )
    code = f"import runpy, sys; sys.argv = [{str(script)!r}]; runpy.run_path({str(script)!r}"
    installed.run(f"{code}, run_name='__main__')").check()
