"""The recipe of configs/mvtec.py on MANTA: --config.data.root=/path/to/manta."""

from ml_collections import config_dict

from configs import default


def get_config(method: str = "rd_ccl") -> config_dict.ConfigDict:
    """Returns that recipe, on the five views of each strip of MANTA."""
    config = default.get_config(method)
    config.name = "manta"
    config.data.layout = "manta"
    config.data.name = "manta"
    config.data.root = "data/manta"
    return config
