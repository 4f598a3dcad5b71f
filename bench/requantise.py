"""Write a GGUF file again with all its matrices in one of llama.cpp's types: python bench/requantise.py IN OUT Q8_0

The baselines of bench/serve_load.py. Types: those that the gguf package can write (Q8_0, Q4_0, Q4_1, ...), by the same
rounding as llama-quantize without an importance matrix.
"""

from pathlib import Path

import numpy as np
import typer
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys
from gguf.quants import dequantize, quantize


def requantise(source: Path, out: Path, kind: str) -> None:
    """Copy every field, and every tensor: matrices in ``kind``, vectors as they are."""
    reader, wanted = GGUFReader(source), GGMLQuantizationType[kind]
    writer = GGUFWriter(out, reader.fields[Keys.General.ARCHITECTURE].contents())
    for field in reader.fields.values():
        if field.name == Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 2:
            writer.add_tensor(tensor.name, quantize(values, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    typer.run(requantise)
