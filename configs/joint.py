"""The recipe of configs/mvtec.py on four data sets at once, 60 classes.

Say where they lie: --config.data.parts.mvtec.root=/path --config.data.parts.visa.root=/path ...
"""

from ml_collections import config_dict

from configs import btad, default, mvtec, real_iad, visa

PARTS = (btad, mvtec, real_iad, visa)


def get_config(method: str = "rd_ccl") -> config_dict.ConfigDict:
    """Returns that recipe, on MVTec AD, VisA, BTAD and Real-IAD.

    A class is a pair of data set and name: the toothbrushes of MVTec AD and Real-IAD stay two.
    """
    config = default.get_config(method)
    config.name = "joint"
    config.data.layout = "joint"
    config.data.name = "joint"
    with config.data.unlocked():
        for single in PARTS:
            data = single.get_config().data
            config.data.parts[data.name] = config_dict.ConfigDict(
                {key: data[key] for key in ("layout", "root", "classes", "splits")}
            )
    return config
