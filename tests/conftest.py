"""What holds for every test: it writes neither into the user's cache nor into the repository, and opens no window."""

import os

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("CNN_DEVICE", "cpu")  # the tests are of the code, not of the accelerator at hand
os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib

# The same inputs at every run, however slow the machine is just then.
settings.register_profile("course", deadline=None, derandomize=True)
settings.load_profile("course")


# Two threads that wait for each other on busy cores are far slower than one, and one gives the same bits every time.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory):
    """Points the folders that `utils.files` hands out at temporary ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CNN_CACHE_DIR", "CNN_RESULTS_DIR", "CNN_FIGURES_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        yield
