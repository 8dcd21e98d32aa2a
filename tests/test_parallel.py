"""Replicated models (DataParallel) and sharded ones (FSDP2), on the CPU and in one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import replicate

import evovit
from evovit.methods import find_method
from tests.conftest import disturb, make_host, pictures


@pytest.fixture
def replica_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return PyTorch's own replication, with copies on the CPU in place of a broadcast to GPUs."""

    def copies(tensors: Sequence[Tensor], devices: Sequence[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    home = sys.modules["torch.nn.parallel.replicate"]  # the package has the function under this name
    monkeypatch.setattr(home, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(home, "_get_device_index", lambda device, optional: device)
    return lambda model: replicate(model, [0])[0]


def check_replica(reduced: evovit.ReducedViT, images: Tensor, replica_of: Any) -> None:
    """A replica, whose `parameters()` are empty, gives the same logits and its gradients reach the model."""
    reduced.train()
    torch.manual_seed(0)
    expected = reduced(images)
    expected.square().mean().backward()
    gradients = {name: p.grad for name, p in reduced.named_parameters()}
    reduced.zero_grad()
    replica = replica_of(reduced)
    assert not list(replica.parameters())
    torch.manual_seed(0)
    logits = replica(images)
    assert torch.equal(logits, expected)
    logits.square().mean().backward()
    for name, p in reduced.named_parameters():
        assert (p.grad is None) == (gradients[name] is None), name
        assert p.grad is None or torch.equal(p.grad, gradients[name]), name


@pytest.mark.parametrize("method", evovit.list_methods())
def test_a_replica_computes_what_the_model_does(method: str, replica_of: Any) -> None:
    options = find_method(method).example
    check_replica(evovit.reduce_tokens(make_host("vit"), method, **options), pictures(), replica_of)


def test_a_replica_of_evo_levit_computes_what_the_model_does(replica_of: Any) -> None:
    host = disturb(timm.create_model("levit_cls_128s", img_size=64, num_classes=5), 0.1)
    for module in host.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 0.0
    check_replica(evovit.reduce_tokens(host, "evo_levit"), pictures(size=64), replica_of)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    where = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


SHARDED = "is sharded by fully_shard, .* fully_shard.reduced., or modules inside the blocks"


@pytest.mark.parametrize("place", ["", "blocks.1", "blocks.1.attn"])
@pytest.mark.parametrize("name", ["vit", "eva02"])
def test_a_sharded_block_is_refused_when_wrapped_and_when_run(
    name: str, place: str, mesh: DeviceMesh
) -> None:
    host = make_host(name)
    reduced = evovit.reduce_tokens(host, "evo_vit", start_block=1, stage_length=2)
    fully_shard(host.get_submodule(place), mesh=mesh)
    for attempt in (
        lambda: reduced(pictures()),
        lambda: reduced.feature_map(pictures()),
        lambda: evovit.reduce_tokens(host, "evo_vit", start_block=1, stage_length=2, verify=False),
    ):
        with pytest.raises(evovit.EvoViTError, match=SHARDED) as refusal:
            attempt()
        assert str(refusal.value).count(". ") == 0


def test_a_sharded_stage_of_levit_is_refused(mesh: DeviceMesh) -> None:
    host = timm.create_model("levit_cls_128s", img_size=64, num_classes=5).eval()
    fully_shard(host.stages[1], mesh=mesh)
    with pytest.raises(evovit.EvoViTError, match=f"The host's Sequential {SHARDED}"):
        evovit.reduce_tokens(host, "evo_levit")


@pytest.mark.parametrize("method", evovit.list_methods())
def test_a_model_sharded_as_a_whole_or_inside_its_blocks_trains(method: str, mesh: DeviceMesh) -> None:
    options, images = find_method(method).example, pictures()
    results = []
    for sharded in (False, True):
        torch.manual_seed(0)
        reduced = evovit.reduce_tokens(make_host("vit"), method, **options).train()
        if sharded:
            for block in reduced.model.blocks:
                fully_shard(block.mlp, mesh=mesh)
                fully_shard(block.attn.qkv, mesh=mesh)
            fully_shard(reduced, mesh=mesh)
        torch.manual_seed(0)
        logits = reduced(images)
        logits.square().mean().backward()
        grad = reduced.model.blocks[1].attn.qkv.weight.grad
        results.append((logits, grad.full_tensor() if sharded else grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
