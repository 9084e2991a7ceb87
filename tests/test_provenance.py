"""Where a number comes from, and `peftbench env`: commits, cores, limits, and no secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from types import ModuleType

import pytest

from peftbench import cli, provenance
from peftbench.record import dumps

TOKEN = "hf_plantedTokenThatMustStayHere"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def fresh():
    """`describe` remembers; what a test changes must neither be missed nor stay."""
    provenance.describe.cache_clear()
    yield
    provenance.describe.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that puts an installed library in front of all others on the path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def add(name, version, direct_url=None):
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        if direct_url is not None:
            text = direct_url if isinstance(direct_url, str) else json.dumps(direct_url)
            (folder / "direct_url.json").write_text(text)
        return provenance.library_commit(metadata.distribution(name))

    return add


def git(folder, *arguments):
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A folder with one commit; its name has a space, which a URL writes as %20."""
    folder = tmp_path / "my checkout"
    folder.mkdir()
    (folder / "code.py").write_text("x = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", "code.py")
    git(folder, "commit", "-q", "-m", "first")
    return folder


# what a library was installed from


def test_a_library_from_an_index_has_a_version_and_no_commit(install):
    assert install("peft", "9.8.7") is None
    assert provenance.library_versions()["peft"] == "9.8.7"
    assert "peft" not in provenance.library_commits()


def test_a_library_from_a_repository_has_its_commit(install):
    install(
        "peft", "0.99.0.dev0",
        {"url": "https://github.com/huggingface/peft.git",
         "vcs_info": {"vcs": "git", "requested_revision": "main", "commit_id": COMMIT}},
    )  # fmt: skip
    assert provenance.library_versions()["peft"] == "0.99.0.dev0"
    assert provenance.library_commits()["peft"] == {
        "commit": COMMIT,
        "dirty": None,
        "repository": "https://github.com/huggingface/peft.git",
    }


def test_an_editable_checkout_has_the_commit_it_is_at(install, checkout):
    origin = {"url": checkout.as_uri(), "dir_info": {"editable": True}}
    assert "%20" in origin["url"]
    head = git(checkout, "rev-parse", "HEAD")
    (checkout / "untracked.txt").write_text("no code")
    assert install("trl", "1.0", origin) == {"commit": head, "dirty": False, "repository": None}

    (checkout / "code.py").write_text("x = 2\n")
    assert provenance.library_commits()["trl"] == {
        "commit": head, "dirty": True, "repository": None,
    }  # fmt: skip


def test_an_editable_folder_without_git_says_that_its_code_is_not_known(install, tmp_path):
    origin = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}
    assert install("peft", "1.0", origin) == {"commit": None, "dirty": None, "repository": None}


def test_a_copy_of_a_checkout_is_not_of_the_checkouts_present_commit(install, checkout):
    assert install("peft", "1.0", {"url": checkout.as_uri(), "dir_info": {}}) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": 3}', '{"url": "https://h/x"}'])
def test_a_damaged_direct_url_costs_no_record(install, text):
    assert install("peft", "1.0", text) is None


def test_the_git_of_a_hook_does_not_answer_for_another_folder(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    commit, dirty = provenance.git_state(checkout)
    monkeypatch.undo()
    assert (commit, dirty) == (git(checkout, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://github.com/o/r", "https://github.com/o/r"),
        (f"https://user:{TOKEN}@github.com/o/r.git", "https://github.com/o/r.git"),
        (f"https://{TOKEN}@host:8443/o/r", "https://host:8443/o/r"),
        (f"https://user:p@{TOKEN}@host/o/r", "https://host/o/r"),
        (f"https://host/o/r?token={TOKEN}#egg={TOKEN}", "https://host/o/r"),
        ("ssh://git@github.com/o/r", "ssh://github.com/o/r"),
        (f"https://user:pass/{TOKEN}@host/o/r", None),  # a slash in a password
        (f"https://[{TOKEN}", None),
        ("file:///home/someone/peft", None),
        ("/home/someone/peft", None),
        (f"{TOKEN}@host:o/r", None),
    ],
)
def test_a_repositorys_address_holds_no_credentials_and_no_path(url, public):
    assert provenance.public_url(url) == public


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", "12.8"),
        ('cuda = "13.0"\n', "13.0"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", None),
    ],
)
def test_the_cuda_version_is_read_from_torchs_files(tmp_path, monkeypatch, text, version):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "torch" / "version.py").write_text(text)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert provenance.torch_cuda_version() == version


# the machine


def test_limits_of_the_control_group_are_in_cores_and_bytes(tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("8589934592\n")
    assert provenance._cpu_quota_cores(tmp_path) == 1.5
    assert provenance._memory_limit_bytes(tmp_path) == 8 * 2**30


def test_no_limit_is_null(tmp_path):
    assert provenance._cpu_quota_cores(tmp_path) is None
    assert provenance._memory_limit_bytes(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert provenance._cpu_quota_cores(tmp_path) is None
    assert provenance._memory_limit_bytes(tmp_path) is None


def test_free_memory_is_the_machines_or_what_the_control_group_leaves(tmp_path, monkeypatch):
    of_machine = provenance._memory_bytes()
    free = provenance.free_memory_bytes()
    assert of_machine is not None
    assert free is not None
    assert 2**28 < free <= of_machine
    monkeypatch.setattr(provenance, "_own_group", lambda: tmp_path)
    (tmp_path / "memory.max").write_text(f"{2**28}\n")
    (tmp_path / "memory.current").write_text(f"{2**27}\n")
    assert provenance.free_memory_bytes() == 2**27
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    assert provenance.free_memory_bytes() == 0


def test_cores_of_the_process_are_not_those_of_the_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 4, 6}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    found = provenance.describe()
    assert (found["cpu_cores_available"], found["cpu_cores"]) == (3, 8)


@pytest.mark.parametrize("marked", [False, True])
def test_a_container_is_known_by_its_mark_and_its_image(tmp_path, monkeypatch, marked):
    mark = tmp_path / ".dockerenv"
    monkeypatch.setattr(provenance, "_CONTAINER_MARKS", (tmp_path / "none", mark))
    monkeypatch.setenv("PEFTBENCH_IMAGE", "sha256:abc" if marked else "")
    if marked:
        mark.touch()
    found = provenance.describe()
    assert found["in_container"] is marked
    assert found["container_image"] == ("sha256:abc" if marked else None)


def test_only_the_listed_variables_are_recorded(monkeypatch):
    for name in provenance.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_SECRET", TOKEN)
    environment = provenance.describe()["environment"]
    assert environment == {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": ""}


def test_a_record_keeps_the_keys_that_earlier_records_have():
    assert {
        "peftbench", "commit", "commit_dirty", "libraries", "python", "platform", "cpu",
        "cpu_cores", "memory_bytes",
    } <= set(provenance.describe())  # fmt: skip


def test_no_library_is_imported_to_tell_its_version():
    code = (
        "import sys; from peftbench import provenance; provenance.describe();"
        "names = {n.replace('-', '_') for n in provenance.LIBRARIES} | {'pynvml'};"
        "print(sorted(names & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


# peftbench env


class FakeDevice:
    def info(self):
        return {
            "name": "NVIDIA H200", "uuid": "GPU-12ab", "driver_version": "570.1",
            "cuda_driver_version": "12.8", "total_bytes": 140 * 2**30, "memory_api": "v2",
            "power_limit_w": 700.0, "mig": None,
        }  # fmt: skip


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that sets a machine's GPUs and torch; it returns what the driver is asked."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    asked = []

    def set_up(*, cuda, devices, note):
        nvml = ModuleType("peftbench.measuring.nvml")

        def open_devices(visible, device_order):
            asked.append((visible, device_order))
            return devices, note

        nvml.open_devices = open_devices
        monkeypatch.setitem(sys.modules, "peftbench.measuring.nvml", nvml)
        monkeypatch.setattr(provenance, "torch_cuda_version", lambda: cuda)
        return asked

    return set_up


def test_env_without_a_gpu_says_what_is_missing_and_what_to_do(machine, monkeypatch, capsys):
    machine(cuda=None, devices=[], note="NVML: driver not loaded")
    monkeypatch.setattr(
        provenance,
        "library_versions",
        lambda: {"torch": "2.13.0+cpu", "peft": "0.21.2", "nvidia-ml-py": "13"},
    )
    monkeypatch.setattr(provenance, "library_commits", dict)
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  torch             2.13.0+cpu, CPU build" in lines
    assert "  peft              0.21.2" in lines
    assert "  bitsandbytes      not installed" in lines
    assert lines[lines.index("GPU") + 1] == "  none  NVML: driver not loaded"
    assert lines[lines.index("Hub") + 1] == "  token  not set"
    assert lines[lines.index("missing for GPU runs") + 1 :] == [
        "  - torch is a CPU build: install a CUDA build, https://pytorch.org",
        "  - no GPU is to be seen: NVML: driver not loaded; install the NVIDIA driver, or give the"
        " container the GPU (docker run --gpus all)",
        "  - bitsandbytes is missing, which qlora needs: pip install bitsandbytes",
        "  - no Hub token is set, which gated models (llama-7b) need: accept the licence on the"
        " Hub and set HF_TOKEN, or use --weights random",
    ]


def test_env_with_all_that_a_gpu_run_needs(machine, monkeypatch, capsys):
    asked = machine(cuda="12.8", devices=[FakeDevice()], note=None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    versions = {"torch": "2.13.0", "peft": "0.99.0", "trl": "1.0", "bitsandbytes": "0.50.2",
                "nvidia-ml-py": "13"}  # fmt: skip
    monkeypatch.setattr(provenance, "library_versions", lambda: versions)
    commits = {
        "peft": {"commit": COMMIT, "dirty": None, "repository": "https://github.com/o/peft"},
        "trl": {"commit": COMMIT, "dirty": True, "repository": None},
    }
    monkeypatch.setattr(provenance, "library_commits", lambda: commits)
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert asked == [("0,1", "PCI_BUS_ID")]
    assert "  torch             2.13.0, CUDA 12.8" in lines
    assert "  peft              0.99.0, commit 0123456789ab, https://github.com/o/peft" in lines
    assert "  trl               1.0, commit 0123456789ab with changes that are not in it" in lines
    assert lines[lines.index("GPU") + 1 : lines.index("Hub") - 1] == [
        "  NVIDIA H200  140.0 GiB, driver 570.1, CUDA up to 12.8, at most 700 W, GPU-12ab"
    ]
    assert "  token  set" in lines
    assert lines[-1] == "nothing is missing for GPU runs"


def test_env_without_torch_says_so(machine, monkeypatch):
    machine(cuda=None, devices=[FakeDevice()], note=None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    versions = {"bitsandbytes": "0.50.2", "nvidia-ml-py": "13"}
    monkeypatch.setattr(provenance, "library_versions", lambda: versions)
    assert cli.environment()["missing_for_gpu"] == [
        "torch is not installed: take a CUDA build, https://pytorch.org"
    ]


def test_env_names_the_variable_that_hides_the_gpus(machine, monkeypatch):
    machine(cuda="12.8", devices=[], note="CUDA_VISIBLE_DEVICES is empty: no GPU is visible")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert cli.environment()["missing_for_gpu"] == [
        "no GPU is to be seen: CUDA_VISIBLE_DEVICES is empty: no GPU is visible"
    ]


def test_env_without_nvml_says_so_instead_of_asking_it(machine, monkeypatch):
    asked = machine(cuda="12.8", devices=[FakeDevice()], note=None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    versions = {"torch": "2.13.0", "bitsandbytes": "0.50.2"}
    monkeypatch.setattr(provenance, "library_versions", lambda: versions)
    assert cli.environment()["missing_for_gpu"] == [
        "no GPU is to be seen: nvidia-ml-py is not installed, so the driver cannot be asked:"
        " pip install nvidia-ml-py"
    ]
    assert asked == []


def test_env_shows_a_note_beside_the_gpus(machine, capsys):
    machine(cuda="12.8", devices=[FakeDevice()], note="all 2 devices are watched")
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("GPU") + 2] == "  note         all 2 devices are watched"


def test_env_states_cores_and_memory_with_their_limits():
    found = {
        "cpu_cores": 64, "cpu_cores_available": 16, "cpu_quota_cores": 1.5,
        "memory_bytes": 128 * 2**30, "memory_limit_bytes": 8 * 2**30,
    }  # fmt: skip
    assert cli._cores_text(found) == "16 of 64 available, limited to the time of 1.5"
    assert cli._memory_text(found) == "128.0 GiB, limited to 8.0 GiB"
    unlimited = found | dict.fromkeys(("cpu_quota_cores", "memory_limit_bytes", "memory_bytes"))
    assert cli._cores_text(unlimited) == "16 of 64 available"
    assert cli._memory_text(unlimited) == "unknown"


@pytest.mark.parametrize("arguments", [["env"], ["env", "--json"]])
def test_env_holds_no_token_and_no_path(machine, install, checkout, monkeypatch, capsys, arguments):
    machine(cuda=None, devices=[], note="NVML: driver not loaded")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HUGGINGFACE_TOKEN", TOKEN)
    install(
        "peft", "1.0",
        {"url": f"https://u:{TOKEN}@github.com/o/peft?t={TOKEN}",
         "vcs_info": {"commit_id": COMMIT}},
    )  # fmt: skip
    install("trl", "1.0", {"url": checkout.as_uri(), "dir_info": {"editable": True}})
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert COMMIT[:12] in out
    assert git(checkout, "rev-parse", "HEAD")[:12] in out
    assert "https://github.com/o/peft" in out
    for private in (TOKEN, str(checkout.parent), checkout.name, str(provenance.Path.home()) + "/"):
        assert private not in out


def test_env_json_is_the_dictionary(machine, capsys):
    machine(cuda=None, devices=[FakeDevice()], note=None)
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(dumps(cli.environment()))
    assert found["gpus"] == [FakeDevice().info()]
    assert found["gpu_note"] is None
    assert found["hub_token_set"] is False
    assert set(provenance.describe()) < set(found)
