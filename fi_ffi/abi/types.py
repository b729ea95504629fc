"""`TVMFFITypeIndex` of tvm/ffi/c_api.h: what the first word of a `TVMFFIAny` says."""

NONE = 0
INT = 1
BOOL = 2
FLOAT = 3
OPAQUE_PTR = 4
DATA_TYPE = 5
DEVICE = 6
DL_TENSOR_PTR = 7
RAW_STR = 8
BYTE_ARRAY_PTR = 9
SMALL_STR = 11
SMALL_BYTES = 12
OBJECT_BEGIN = 64  # this and above: a reference-counted object
STR = 65
BYTES = 66
ERROR = 67
FUNCTION = 68
SHAPE = 69
TENSOR = 70
ARRAY = 71
MAP = 72
MODULE = 73
LIST = 75
DICT = 76
