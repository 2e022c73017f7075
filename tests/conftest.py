"""What holds for every test: it writes neither into the user's cache nor into the repository, and opens no window."""

import os

import pytest
from hypothesis import settings

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib

# The same inputs at every run, however slow the machine is just then.
settings.register_profile("course", deadline=None, derandomize=True)
settings.load_profile("course")


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory):
    """Points the folders that `utils.files` hands out at temporary ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CNN_CACHE_DIR", "CNN_RESULTS_DIR", "CNN_FIGURES_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        yield
