"""Reading a safetensors file by hand gives what its own library gives, and damage is one line."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from models import tensor_file
from models.errors import ConfigError
from models.tensor_file import DTYPES, TensorFile

KINDS = st.sampled_from(list(DTYPES.values()))
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn=st.lists(st.tuples(KINDS, SHAPES, KINDS), min_size=1, max_size=4), piece=st.integers(1, 40))
def test_what_is_read_is_what_is_there(drawn, piece):
    generator = torch.Generator().manual_seed(0)
    wanted = {f"t{i}": torch.randn(shape, generator=generator).to(kind) for i, (kind, shape, _) in enumerate(drawn)}
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "PIECE", piece)
        save_file(wanted, Path(scratch) / "x.safetensors", metadata={"format": "pt"})
        file = TensorFile(Path(scratch) / "x.safetensors")
        assert file.tensors.keys() == load_file(file.path).keys() == wanted.keys()
        for (_, _, other), (name, tensor) in zip(drawn, wanted.items(), strict=True):
            assert file.tensors[name].shape == tensor.shape
            assert file.dtype(name) == tensor.dtype
            assert torch.equal(file.mapped(name), tensor)
            pieces = [value for piece in file.pieces(name) for value in piece.tolist()]
            assert pieces == tensor.view(-1).tolist()
            for kind in (tensor.dtype, other):
                place = torch.full(tensor.shape, float("nan"), dtype=kind)
                file.read_into(name, place)
                assert torch.equal(place, tensor.to(kind))


def test_a_part_of_a_larger_tensor_is_filled(tmp_path):
    save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "x.safetensors")
    whole = torch.zeros(4, 3)
    TensorFile(tmp_path / "x.safetensors").read_into("a", whole[1:3])
    assert torch.equal(whole, torch.tensor([[0.0, 0, 0], [0, 1, 2], [3, 4, 5], [0, 0, 0]]))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_file_that_shrinks_after_it_was_opened(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(50), "b": torch.zeros(50)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    file.read_into("a", torch.empty(50, dtype=kind))
    with pytest.raises(ConfigError, match=r"^damaged weights: x\.safetensors ends within 'b'$"):
        file.read_into("b", torch.empty(50, dtype=kind))
