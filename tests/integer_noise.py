"""The noise specification in Python's own integers, written apart from the library: the tests' oracle."""

M32 = (1 << 32) - 1


def _mix(h: int) -> int:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * factor % (1 << 32)
    return h ^ (h >> 16)


def integer_word(seed: int, bh: int, q: int, k: int, stream: int = 0) -> int:
    """The 32-bit word of one coordinate; ``seed`` is a signed 64-bit integer."""
    unsigned = seed % (1 << 64)
    low, high = unsigned % (1 << 32), unsigned >> 32
    first_key = _mix(low ^ _mix((bh * 0x9E3779B1 + 0x7F4A7C15) % (1 << 32)))
    second_key = _mix((high + _mix((first_key + bh) % (1 << 32))) % (1 << 32))
    c = [q & M32 & ~8, stream, k & M32 & ~8, 0]
    for i in range(7):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        ka = (first_key + i * 0x9E3779B9) % (1 << 32)
        kb = (second_key + i * 0xBB67AE85) % (1 << 32)
        c = [(right >> 32) ^ c[1] ^ ka, right & M32, (left >> 32) ^ c[3] ^ kb, left & M32]
    return c[2 * (q >> 3 & 1) + (k >> 3 & 1)]
