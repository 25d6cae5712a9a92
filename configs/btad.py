"""The recipe of configs/mvtec.py on BTAD: --config.data.root=/path/to/BTech_Dataset_transformed."""

from ml_collections import config_dict

from configs import default


def get_config(method: str = "rd_ccl") -> config_dict.ConfigDict:
    """Returns that recipe, on BTAD."""
    config = default.get_config(method)
    config.name = "btad"
    config.data.layout = "btad"
    config.data.name = "btad"
    config.data.root = "data/BTech_Dataset_transformed"
    return config
