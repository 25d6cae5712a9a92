"""Your own photos in the MVTec AD folder layout: --config.data.root=/path/to/photos.

`<class>/train/good/*` is required; `<class>/test/good/*`, `<class>/test/<defect>/*` and
`<class>/ground_truth/<defect>/<stem>_mask.png` say how well it works, as far as they are there.
"""

from ml_collections import config_dict

from configs import default


def get_config(method: str = "rd_ccl") -> config_dict.ConfigDict:
    """Returns the published recipe without a data folder; name yours with --config.data.root."""
    config = default.get_config(method)
    config.name = "folder"
    return config
