"""Named recipes, and recipes as TOML. The only room where text becomes schemes."""

from ._library import (
    AWQ_W4_ASYM_G64 as AWQ_W4_ASYM_G64,
    by_name as by_name,
    find as find,
    FP8 as FP8,
    GPTQ_W2_ASYM_G64 as GPTQ_W2_ASYM_G64,
    GPTQ_W3_SYM_G64 as GPTQ_W3_SYM_G64,
    GPTQ_W4_ASYM_G64 as GPTQ_W4_ASYM_G64,
    GPTQ_W4_SYM_G64 as GPTQ_W4_SYM_G64,
    HQQ_W4_G64 as HQQ_W4_G64,
    LLM_INT8 as LLM_INT8,
    MXFP4 as MXFP4,
    MXFP8 as MXFP8,
    NAMED as NAMED,
    NF4_DOUBLE as NF4_DOUBLE,
    NVFP4 as NVFP4,
    SMOOTHQUANT_W8A8 as SMOOTHQUANT_W8A8,
    SMOOTHQUANT_W8A8_STATIC as SMOOTHQUANT_W8A8_STATIC,
    W4A16_G64 as W4A16_G64,
    W4A16_G64_E8 as W4A16_G64_E8,
    W8A8 as W8A8,
    W8A16 as W8A16,
)
from ._parse import (
    added_from_data as added_from_data,
    added_to_data as added_to_data,
    dump as dump,
    load as load,
    parse as parse,
    scheme_from_dict as scheme_from_dict,
    scheme_to_dict as scheme_to_dict,
)
