"""The bank on disk: reuse, keys, damage, several processes, memory."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qratk.bank import store
from qratk.bank.digests import checksum
from qratk.bank.store import BankStore, Part, Plan, bank_directory
from qratk.bank.table import Chosen
from qratk.core.configuration import Configuration
from qratk.core.errors import QuantizationError
from qratk.quantizers.base import Quantizer, quantizers
from qratk.quantizers.int8 import Int8Quantizer

BITS = (2, 3, 4, 8)


def told(backbone) -> list[str]:
    """What a backbone says from now on."""
    said: list[str] = []
    backbone.say = said.append
    return said


def built(tiny_backbone: Callable[..., Any], folder: Path, *, bits=BITS, **options: Any) -> tuple[Any, list[str]]:
    """A backbone with its bank from `folder`, and what it said."""
    backbone = tiny_backbone(bank_dir=folder, **options)
    said = told(backbone)
    backbone.build_bank(bits)
    return backbone, said


def packed_of(backbone, bits=BITS):
    return {
        (name, b, part): tensor
        for name, bank in backbone.banks.items()
        for b in bits
        for part, tensor in bank.variants[b].packed.items()
    }


def assert_same(a, b):
    first, second = packed_of(a), packed_of(b)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype
        assert torch.equal(tensor, second[key]), key


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.fixture
def no_quantizing(monkeypatch):
    """Call it to make every quantizer refuse to work from then on."""

    def forbid() -> None:
        def refuse(*_: Any) -> None:
            raise AssertionError("nothing should be quantised here")

        for name in ("hqq", "nf4", "int8"):
            monkeypatch.setattr(type(quantizers.create(name)), "quantize", refuse)

    return forbid


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_second_backbone_maps_what_the_first_one_packed(family, tiny_backbone, tmp_path, no_quantizing):
    memory = tiny_backbone(family, bits=BITS, bank_dir=None)
    first, _ = built(tiny_backbone, tmp_path, family=family)
    no_quantizing()
    second, said = built(tiny_backbone, tmp_path, family=family)
    assert said == []
    assert len(files(tmp_path)) == len(BITS) * 3
    assert_same(memory, first)
    assert_same(memory, second)
    assert not list(tmp_path.rglob("*.tmp"))


def test_logits_do_not_depend_on_where_the_bank_lies(tiny_backbone, tiny_batch, tmp_path):
    backbones = [tiny_backbone(bank_dir=None), *(tiny_backbone(bank_dir=tmp_path) for _ in range(2))]
    logits = []
    for backbone in backbones:
        backbone.build_bank(BITS)
        backbone.release_reference()
        backbone.activate(Configuration.of([2, 3, 8], [4, 0, 8]), seed=0)
        with torch.no_grad():
            logits.append(backbone.model(**tiny_batch).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_packed_tensors_are_views_over_the_mapped_file(tiny_backbone, tmp_path):
    backbone, _ = built(tiny_backbone, tmp_path, bits=(8,))
    codes = backbone.banks["model.layers.0.mlp.up_proj"].variants[8].packed["codes"]
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    assert any(low <= codes.data_ptr() < high for low, high in ranges)


def test_other_weights_or_quantizers_make_other_files(tiny_backbone, tmp_path):
    built(tiny_backbone, tmp_path, bits=(2, 4))
    assert len(files(tmp_path)) == 6
    built(tiny_backbone, tmp_path, bits=(2, 4), seed=1)
    assert len(files(tmp_path)) == 12
    # Another quantizer of 2 bits leaves the files of 4 bits in use.
    table = {2: quantizers.create("hqq", group_size=16), 4: quantizers.create("nf4")}
    built(tiny_backbone, tmp_path, bits=(2, 4), quantizers=table)
    assert len(files(tmp_path)) == 15


def test_a_quantizer_whose_code_changed_makes_another_bank(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "my_own_quantizer.py"
    path.write_text("from qratk.quantizers.int8 import Int8Quantizer\nclass Mine(Int8Quantizer):\n    pass\n")
    mine = importlib.import_module("my_own_quantizer").Mine()
    digests = set()
    for text in ("", "# changed\n"):
        path.write_text(path.read_text() + text)
        store._source_digest.cache_clear()
        digests.add(Plan(8, (("layer", (Part("p", (4, 4), Chosen(mine, 8)),)),)).digest)
    assert len(digests) == 2


def test_fallbacks_are_stored_as_what_was_chosen(tiny_backbone, tmp_path):
    options = {"hidden": 40, "intermediate": 27, "bits": (2,)}
    table = {2: quantizers.create("hqq"), 4: quantizers.create("nf4")}
    first, _ = built(tiny_backbone, tmp_path, quantizers=table, **options)
    second, said = built(tiny_backbone, tmp_path, quantizers=table, **options)
    assert said == []
    assert first.fallbacks == second.fallbacks != ()
    up = second.banks["model.layers.0.mlp.up_proj"].variants[2]
    assert (up.bits, type(up.quantizer).__name__) == (4, "NF4Quantizer")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_safetensors(path: Path) -> None:
    path.write_text("something else altogether")


def of_another_layer(path: Path) -> None:
    path.write_bytes(path.with_name("0001.safetensors").read_bytes())


def with_other_tensors(path: Path) -> None:
    metadata = read_metadata(path)
    tensors = {name: tensor[:1].clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={**metadata, "checksum": checksum(tensors)})


def read_metadata(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, no_safetensors, of_another_layer, with_other_tensors])
def test_a_damaged_or_foreign_file_is_noticed_and_made_again(damage, tiny_backbone, tmp_path, no_quantizing):
    first, _ = built(tiny_backbone, tmp_path, bits=(8,))
    path = files(tmp_path)[0]
    whole = path.read_bytes()
    keep = packed_of(first, (8,))
    kept = {key: tensor.clone() for key, tensor in keep.items()}
    temporary = path.with_name("new")  # a writer replaces a file, it does not change one that others have mapped
    temporary.write_bytes(whole)
    os.replace(temporary, path)
    damage(path)
    second, said = built(tiny_backbone, tmp_path, bits=(8,))
    assert len(said) == 1
    assert "made again" in said[0]
    assert str(path) in said[0]
    assert all(torch.equal(kept[key], tensor) for key, tensor in packed_of(second, (8,)).items())
    assert not list(tmp_path.rglob("*.tmp"))
    no_quantizing()
    assert built(tiny_backbone, tmp_path, bits=(8,))[1] == []


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_bank_in_memory_and_says_so_once(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "save_file", no_space)
    backbone, said = built(tiny_backbone, tmp_path)
    assert len(said) == 1
    assert "No space left" in said[0]
    assert "in memory" in said[0]
    assert_same(backbone, tiny_backbone(bits=BITS, bank_dir=None))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".safetensors")]


_ROOT = Path(__file__).parents[2]


def test_a_folder_that_cannot_be_made_leaves_the_bank_in_memory(tiny_backbone, tmp_path):
    (tmp_path / "file").write_text("")
    backbone, said = built(tiny_backbone, tmp_path / "file" / "banks")
    assert len(said) == 1
    assert "bank_dir" in said[0]
    assert_same(backbone, tiny_backbone(bits=BITS, bank_dir=None))


def test_without_a_folder_nothing_is_written(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("QRATK_CACHE", str(tmp_path))
    tiny_backbone(bits=BITS, bank_dir=None)
    assert list(tmp_path.iterdir()) == []
    tiny_backbone(bits=(8,), bank_dir="auto")
    assert files(tmp_path)


def test_where_banks_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QRATK_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert bank_directory("auto") == tmp_path / ".cache" / "qratk" / "banks"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert bank_directory("auto") == Path("/elsewhere/qratk/banks")
    monkeypatch.setenv("QRATK_CACHE", "~/mine")
    assert bank_directory("auto") == tmp_path / "mine"
    assert bank_directory("~/given") == tmp_path / "given"
    assert bank_directory(None) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sixteen_bits_are_stored_only_if_the_checkpoint_has_more(dtype, tiny_model, tmp_path, tiny_batch):
    from qratk.backbone.backbone import Backbone

    logits = []
    for folder in (None, tmp_path, tmp_path):
        backbone = Backbone.from_model(tiny_model().to(dtype), quantizers={}, bank_dir=folder, compute_dtype="float32")
        with torch.no_grad():
            logits.append(backbone.model(**tiny_batch).logits)
            backbone.build_bank([16])
            backbone.release_reference()
            backbone.activate(Configuration.uniform(16, 0, 3), seed=0)
            logits.append(backbone.model(**tiny_batch).logits)
    assert all(torch.equal(logits[0], other) for other in logits)
    assert len(files(tmp_path)) == (0 if dtype == torch.bfloat16 else 3)


def test_stored_bit_widths_are_there_even_after_the_release(tiny_backbone, tmp_path):
    built(tiny_backbone, tmp_path, bits=(4, 8))
    backbone, _ = built(tiny_backbone, tmp_path, bits=(4,))
    backbone.release_reference()
    backbone.build_bank([8])
    with pytest.raises(QuantizationError, match="released"):
        backbone.build_bank([2])


def test_the_folder_says_what_it_is(tiny_backbone, tmp_path):
    built(tiny_backbone, tmp_path, bits=(4,))
    (path,) = tmp_path.rglob("bank.json")
    document = json.loads(path.read_text())
    assert "may be deleted" in document["about"]
    assert document["bits"] == "4"
    assert document["quantizers"]["model.layers.0.mlp.up_proj"].startswith("nf4(")


@dataclass(frozen=True)
class Slow(Int8Quantizer):
    """int8 that takes its time, and counts."""

    log: str = ""
    seconds: float = 0.2

    def quantize(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(self.seconds)
        return super().quantize(weight, bits)


def fetch_all(folder: Path, log: Path, *, seconds: float, layers: int = 4) -> list[torch.Tensor]:
    """Codes of a bank of a few layers, from a store; run by several processes at once."""
    quantizer: Quantizer = Slow(log=str(log), seconds=seconds)
    part = Part("p", (8, 8), Chosen(quantizer, 8))
    plan = Plan(8, tuple((f"layer{i}", (part,)) for i in range(layers)))
    bank = BankStore(folder, weights="0" * 64)
    weight = torch.arange(64.0).reshape(8, 8)
    return [
        bank.fetch(plan, i, lambda i=i: {"p": quantizer.quantize(weight + i, 8)})["p"]["codes"] for i in range(layers)
    ]


_CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/bank")
from test_store import fetch_all
fetch_all(Path(sys.argv[1]), Path(sys.argv[2]), seconds=float(sys.argv[3]))
"""


_LIMITED = (
    """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
"""
    + _CHILD.replace("fetch_all(", "codes = fetch_all(")
    + "print(len(codes))"
)


def test_a_limit_on_file_sizes_leaves_the_bank_in_memory(tmp_path):
    """The same as a full disk, with a real failure of the system."""
    command = [sys.executable, "-c", _LIMITED, str(tmp_path / "banks"), str(tmp_path / "log"), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT)
    assert done.stdout.split() == ["4"]
    assert done.stderr.count("in memory") == 1
    assert files(tmp_path) == []


def child(folder: Path, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _CHILD, str(folder), str(log), str(seconds)], cwd=_ROOT)


def test_of_several_processes_each_layer_is_made_by_one(tmp_path):
    log = tmp_path / "log"
    children = [child(tmp_path / "banks", log, 0.3) for _ in range(2)]
    assert [process.wait(timeout=100) for process in children] == [0, 0]
    assert len(log.read_text().splitlines()) == 4


def test_a_killed_builder_leaves_no_damage(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "banks"
    process = child(folder, log, 100.0)
    while not log.exists():
        time.sleep(0.05)
    plan_folder = next(folder.rglob(".lock")).parent
    (plan_folder / ".0000-1-dead.tmp").write_bytes(b"half a file")
    process.send_signal(signal.SIGKILL)
    process.wait()
    codes = fetch_all(folder, log, seconds=100.0, layers=0)
    assert codes == []
    assert files(folder) == []
    # The lock died with its holder; what it left behind is cleared away by whoever writes next.
    quantizer = Slow(log=str(log), seconds=100.0)
    part = Part("p", (8, 8), Chosen(quantizer, 8))
    plan = Plan(8, tuple((f"layer{i}", (part,)) for i in range(4)))
    packed = Int8Quantizer().quantize(torch.ones(8, 8), 8)
    found = BankStore(folder, weights="0" * 64).fetch(plan, 0, lambda: {"p": packed})
    assert torch.equal(found["p"]["codes"], packed["codes"])
    assert [path.name for path in files(folder)] == ["0000.safetensors"]
    assert not list(folder.rglob("*.tmp"))


def test_an_exported_model_is_the_same_from_a_mapped_bank(tiny_backbone, tmp_path):
    from qratk.exporters.packed import save_quantized

    written = []
    for folder in (None, tmp_path / "banks", tmp_path / "banks"):
        backbone, _ = built(tiny_backbone, folder, bits=(2, 4))
        configuration = Configuration.of([2, 4, 2], [4, 4, 4])
        backbone.activate(configuration, seed=0)
        target = tmp_path / f"export{len(written)}"
        save_quantized(backbone, configuration, target)
        written.append(
            {name: t for path in sorted(target.rglob("*.safetensors")) for name, t in load_file(path).items()}
        )
    assert written[0].keys() == written[1].keys() == written[2].keys() != set()
    assert all(torch.equal(t, other[name]) for name, t in written[0].items() for other in written)


_PEAK = """
import sys
import torch
from transformers import LlamaConfig, AutoModelForCausalLM
from qratk.backbone.backbone import Backbone
from qratk.backbone.loading import load_model
from qratk.quantizers.base import quantizers
folder, banks, mode = sys.argv[1:]
if mode == "write":
    config = LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=1408, num_hidden_layers=24,
                         num_attention_heads=8, num_key_value_heads=8)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder, max_shard_size="50MB")
    raise SystemExit
import bitsandbytes.functional
def anonymous():
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024
table = {4: quantizers.create("nf4"), 8: quantizers.create("int8"), 16: quantizers.create("none")}
model = load_model(folder, trust_remote_code=False, weights=True)
backbone = Backbone.from_model(model, quantizers=table, bank_dir=banks if mode == "disk" else None)
packed, peak, before = backbone._packer.packed, 0, anonymous()
def watched(name, chosen):
    global peak
    out = packed(name, chosen)
    peak = max(peak, anonymous() - before)
    return out
backbone._packer.packed = watched
backbone.build_bank((4, 8, 16))
layer = sum(bank.reference.nbytes for _, bank in backbone.layers[0].modules)
bank = sum(variant.nbytes for bank in backbone.banks.values() for variant in bank.variants.values())
print(max(peak, anonymous() - before), layer, bank)
"""


@pytest.mark.slow
def test_building_takes_about_one_layer_of_memory_besides_the_mapped_bank(tmp_path):
    def run(mode: str) -> list[int]:
        command = [sys.executable, "-c", _PEAK, str(tmp_path / "model"), str(tmp_path / "banks"), mode]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT, env=environment).stdout
        return [int(word) for word in out.split()]

    run("write")
    in_memory, layer, bank = run("memory")
    mapped = run("disk")[0]
    assert in_memory > bank > 20 * layer
    assert mapped < 2 * layer
