"""Checkpoints of the released repositories, read and written: Dassl's ``model.pth.tar-<epoch>`` files.

Their trainers save ``{"state_dict", "epoch", "optimizer", "scheduler", "val_result"}`` of one registered object: the
prompt learner (CoOp, CoCoOp, UPT), or the whole model with the frozen CLIP in it (MaPLe, IVLP, both VPTs). Only the
trained tensors matter. The CLIP comes from elsewhere, and the token buffers, the embeddings of the class names, are
computed anew; theirs serve to check that class names, initial words and CLIP are the ones of the file. What each method
is called there, and which tensors it has, is declared in its file in upt_fast/methods.
"""

from upt_fast.released.exporting import checkpoint_path, export_checkpoint, released_settings
from upt_fast.released.file import TOKEN_NAMES, read_file
from upt_fast.released.importing import Imported, import_checkpoint, read_released

__all__ = [
    "TOKEN_NAMES",
    "Imported",
    "checkpoint_path",
    "export_checkpoint",
    "import_checkpoint",
    "read_file",
    "read_released",
    "released_settings",
]
