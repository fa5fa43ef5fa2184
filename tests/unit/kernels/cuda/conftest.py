"""Libraries of the emulated kernels, built once a session, several at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cuda_centred import known
from emulator.emulated import EmulatedRunner, compiler


@pytest.fixture(scope="session")
def libraries(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the libraries; those of all cases of this session are in it."""
    if compiler() is None:
        pytest.skip("g++ is not installed: the emulator cannot be built (Debian and Ubuntu: apt-get install g++)")
    folder = tmp_path_factory.mktemp("emulated")
    runner = EmulatedRunner(folder)
    users = [item for item in request.session.items if "libraries" in getattr(item, "fixturenames", ())]
    parameters = [item.callspec.params for item in users if hasattr(item, "callspec")]
    cases = {each["case"] for each in parameters if "case" in each}
    with known(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as executor:
        list(executor.map(runner.prepare, cases))
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are so small that torch's threads only cost time, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
