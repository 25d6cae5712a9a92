"""The recipe of configs/mvtec.py on Real-IAD: --config.data.root=/path/to/Real-IAD/realiad_512."""

from ml_collections import config_dict

from configs import default


def get_config(method: str = "rd_ccl") -> config_dict.ConfigDict:
    """Returns that recipe, on all five views of Real-IAD."""
    config = default.get_config(method)
    config.name = "real_iad"
    config.data.layout = "real_iad"
    config.data.name = "real_iad"
    config.data.root = "data/Real-IAD/realiad_512"
    return config
