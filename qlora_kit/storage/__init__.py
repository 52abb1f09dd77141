"""The only way that anything is written, and the only reader of lines.

`files` writes a file whole. `folders` writes a folder whole, with a manifest of hashes. `space`
checks room and permission, and holds the lock. `reading` reads lines and strict JSON. `faults`
turns an `OSError` into one line. `confine` checks that a stranger's folder has no way out of it.
`pointers` checks that a file is here, and not only Git LFS's pointer to it.
"""

from __future__ import annotations

from qlora_kit.storage.confine import check_confined
from qlora_kit.storage.faults import storage_errors
from qlora_kit.storage.files import (
    load_tensors,
    save_tensors,
    sync_file,
    write_by,
    write_bytes,
    write_json,
    write_text,
)
from qlora_kit.storage.folders import (
    MANIFEST,
    clean_up,
    delete_folder,
    file_hash,
    is_sealed,
    manifest_hash,
    staged_folder,
    verify_folder,
)
from qlora_kit.storage.pointers import check_no_pointer
from qlora_kit.storage.reading import (
    Line,
    decode,
    parse_json,
    read_json,
    read_json_list,
    read_last_lines,
    read_lines,
    read_raw_lines,
    read_text,
    read_whole,
    strict_json,
)
from qlora_kit.storage.space import LOCK, check_space, check_writable, is_locked, only_writer

__all__ = [
    "LOCK", "MANIFEST", "Line", "check_confined", "check_no_pointer", "check_space",
    "check_writable", "clean_up", "decode", "delete_folder", "file_hash", "is_locked",
    "is_sealed", "load_tensors", "manifest_hash", "only_writer", "parse_json", "read_json",
    "read_json_list", "read_last_lines", "read_lines", "read_raw_lines", "read_text", "read_whole",
    "save_tensors", "staged_folder", "storage_errors", "strict_json", "sync_file", "verify_folder",
    "write_by", "write_bytes", "write_json", "write_text",
]  # fmt: skip
