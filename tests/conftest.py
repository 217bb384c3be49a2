from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # `import checkpoints`, in every import mode of pytest
# On a loaded machine any example may take a second, and so may the drawing of any.
settings.register_profile("hal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hal")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fake device last: PyTorch has it for the rest of the process, and an older one then refuses barriers."""
    items.sort(key=lambda item: "fake" in item.path.parts)


@pytest.fixture(scope="session", autouse=True)
def this_checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In a worktree of git another checkout is installed. The processes that tests start then import the packages of
    this checkout all the same, and find metadata that says that it is installed."""
    from hal.cli.identity import DISTRIBUTION, installation

    root = Path(__file__).resolve().parents[1]
    with pytest.MonkeyPatch.context() as patch:
        installed, where, _ = installation()
        if installed is not None and where != root:
            site = tmp_path_factory.mktemp("site")
            info = site / f"{DISTRIBUTION.replace('-', '_')}-0.dist-info"
            info.mkdir()
            for name in ("METADATA", "RECORD", "entry_points.txt"):
                (info / name).write_text(installed.read_text(name) or "")
            (info / "direct_url.json").write_text(json.dumps({"url": root.as_uri(), "dir_info": {"editable": True}}))
            added = [str(root), str(site)]
            patch.setattr(sys, "path", [*added, *sys.path])
            inherited = os.environ.get("PYTHONPATH")
            patch.setenv("PYTHONPATH", os.pathsep.join([*added, *([inherited] if inherited else [])]))
        yield


@pytest.fixture(scope="session", autouse=True)
def ranks_are_forked(this_checkout: None) -> Iterator[None]:
    """Engines of this process fork their ranks from a process that has loaded what a rank imports: a rank is there in a
    tenth of the time. Engines in processes of their own start their ranks as users' engines do."""
    import forked

    from workers.executors import processes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "subprocess", forked)
        yield
    forked.close()


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """A test that changes the state of the process, or leaves a process, fails here by name, and not the next ones."""
    import leaks

    before, children = leaks.state(), leaks.children()
    yield
    found = leaks.changes(before, children)
    if found:
        leaks.restore(before)
        pytest.fail("\n".join(["the test has left behind:", *found]), pytrace=False)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(name)`: the directory of one of `checkpoints.NAMES`, made on first use."""
    import checkpoints

    return checkpoints.made_once(checkpoints.save, tmp_path_factory)
