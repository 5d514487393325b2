"""4-bit weights by loops over single codes: what `k2kernels.reference.w4_gemm` says with tensors."""

import numpy as np
import torch

import k2kernels

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
QUANTIZERS = {"int4": k2kernels.quantize_int4_group32, "mxfp4": k2kernels.quantize_mxfp4}


def random_w4(kind, *shape):
    """Codes and scales of any value that can be packed; all 16 codes occur."""
    k = shape[-1]
    raw = torch.randint(256, (*shape[:-1], k // 2), dtype=torch.uint8)
    if kind != "mxfp4":
        scales = torch.randn(*shape[:-1], k // 32).exp2().mul(0.01)
        if kind == "int4_wide" and scales.numel():
            scales *= 0.75 / scales.max()
        return raw.view(torch.int32), scales.bfloat16()
    return raw, torch.randint(100, 129, (*shape[:-1], k // 32), dtype=torch.uint8)


def values(codes, scales):
    """float64 [N, K] of one matrix, code by code."""
    raw = codes.contiguous().view(torch.uint8)
    want = torch.empty(raw.shape[0], 2 * raw.shape[1], dtype=torch.float64)
    for n, row in enumerate(raw.tolist()):
        for byte, code in enumerate(row):
            for half in (0, 1):
                k, nibble = 2 * byte + half, code >> 4 if half else code & 15
                if codes.dtype == torch.int32:
                    want[n, k] = (nibble - 8) * float(scales[n, k // 32])
                else:
                    sign = -1.0 if nibble & 8 else 1.0
                    want[n, k] = sign * E2M1[nibble & 7] * 2.0 ** (int(scales[n, k // 32]) - 127)
    return want


def pair_places(kind, i):
    """Where the four bits of both codes of pair i of a packed word are, from the lowest on."""
    if kind == "int4":
        low = [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]
    else:  # magnitude, sign
        low = [[0, 1, 2, 9], [4, 5, 6, 13], [10, 11, 12, 19], [14, 7, 8, 15]][i]
    return low, [(place + 16) % 32 for place in low]


def packed_bytes(codes, scales, gated):
    """The packed bytes of one matrix, lane by lane and word by word."""
    int4 = codes.dtype == torch.int32
    raw = codes.contiguous().view(torch.uint8).numpy()
    n, k = raw.shape[0], 2 * raw.shape[1]
    rows, columns = -(-n // 64), -(-k // 64)
    data = np.zeros((rows, columns, 2048 + (256 if int4 else 128)), dtype=np.uint8)

    def row_of(packed):
        if not gated:
            return packed if packed < n else None
        i = packed // 16 * 8 + packed % 8
        return None if i >= n // 2 else i + (n // 2 if packed % 16 >= 8 else 0)

    def nibble(row, column):
        if row is None or column >= k:
            return 8 if int4 else 0
        byte = int(raw[row, column // 2])
        return byte >> 4 if column % 2 else byte & 15

    places = [pair_places("int4" if int4 else "mxfp4", i) for i in range(4)]
    for tile in range(rows):
        for chunk in range(columns):
            words, stored = [], []
            for block in range(4):
                for lane in range(32):
                    g, t = divmod(lane, 4)
                    for w in range(4):
                        row, group = row_of(64 * tile + 16 * block + g + 8 * (w // 2)), w % 2
                        word = 0
                        for h in (0, 1):
                            for a in (0, 1):
                                first = 64 * chunk + 32 * group + 16 * h + 8 * a + 2 * t
                                i = 2 * h + a
                                for j, bits in enumerate(places[i]):
                                    code = nibble(row, first + j)
                                    word |= sum((code >> bit & 1) << place for bit, place in enumerate(bits))
                        words.append(word)
                for g in range(8):
                    for row in (row_of(64 * tile + 16 * block + g), row_of(64 * tile + 16 * block + g + 8)):
                        for group in (0, 1):
                            column = 2 * chunk + group
                            real = row is not None and column < k // 32
                            if int4:
                                value = float(scales[row, column]) * 2.0**129 if real else 0.0
                                stored.append(int(torch.tensor(value).bfloat16().view(torch.int16)) & 0xFFFF)
                            else:
                                stored.append(int(scales[row, column]) + 126 if real else 0)
            data[tile, chunk, :2048] = np.array(words, dtype="<u4").view(np.uint8)
            data[tile, chunk, 2048:] = np.array(stored, dtype="<u2" if int4 else "u1").view(np.uint8)
    return torch.from_numpy(data)
