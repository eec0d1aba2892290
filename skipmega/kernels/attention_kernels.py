"""The Triton kernels of causal attention of packed queries: forward, and backward without atomics.

Queries ascend by position along a sequence, so the keys that a block of them sees are a range of key blocks,
of which all but the ends are seen by every query of the block and need no mask. The same holds the other way
round, for the queries that see a block of keys. Nothing is sorted and no list of blocks is made.

:mod:`skipmega.kernels.attention_triton` runs them.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(q, k, scale, at, lower, columns, DOCUMENTS: tl.constexpr, MASKED: tl.constexpr):
    """[m, n] scores to base 2 of queries [m, d] and keys [d, n], minus infinity where a key is not seen."""
    scores = tl.dot(q, k, input_precision="tf32x3") * scale
    if MASKED:
        seen = columns[None, :] <= at[:, None]
        if DOCUMENTS:
            seen = seen & (columns[None, :] >= lower[:, None])
        scores = tl.where(seen, scores, -float("inf"))
    return scores


@triton.jit
def _queries(
    positions, since, first, count, batch, sequence, length, M: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Position and first visible position of M queries; those past the last repeat it."""
    rows = tl.minimum(first + tl.arange(0, M), count - 1)
    at = tl.load(positions + rows * batch + sequence).to(tl.int32)
    lower = at * 0
    if DOCUMENTS:
        lower = tl.load(since + sequence * length + at).to(tl.int32)
    return at, lower


@triton.jit
def _key_blocks(at, lower, N: tl.constexpr):
    """Of the key blocks from the first to the last (exclusive) that any query sees, those every one sees."""
    first = tl.min(lower, 0) // N
    last = tl.max(at, 0) // N + 1
    whole = tl.minimum((tl.max(lower, 0) + N - 1) // N, last)
    end = tl.maximum((tl.min(at, 0) + 1) // N, whole)
    return first, whole, end, last


@triton.jit
def _forward_blocks(
    sums, largest, out, q, key, value, key_step, value_step, at, lower, scale, length, start, stop,
    D: tl.constexpr, N: tl.constexpr, DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, D)
    for block in range(start, stop):
        columns = block * N + tl.arange(0, N)
        k = tl.load(
            key + columns[None, :].to(tl.int64) * key_step + channels[:, None],
            mask=columns[None, :] < length,
            other=0.0,
        )
        scores = _scores(q, k, scale, at, lower, columns, DOCUMENTS, MASKED)
        new = tl.maximum(largest, tl.max(scores, 1))
        # a row that has seen nothing yet has no largest score
        safe = tl.where(new == -float("inf"), 0.0, new) if MASKED else new
        p = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(largest - safe)
        v = tl.load(
            value + columns[:, None].to(tl.int64) * value_step + channels[None, :],
            mask=columns[:, None] < length,
            other=0.0,
        )
        sums = sums * shrink + tl.sum(p, 1)
        out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
        largest = new
    return sums, largest, out


@triton.jit
def attention_forward(
    query, key, value, positions, since, out, logsum, scale, count, length, batch, heads, group,
    q_row, q_seq, q_head, k_row, k_seq, k_head, v_row, v_seq, v_head,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    # the last blocks have the most keys: begun first
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    sequence, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows, channels = first + tl.arange(0, M), tl.arange(0, D)
    inside = rows < count
    at, lower = _queries(positions, since, first, count, batch, sequence, length, M, DOCUMENTS)
    query += sequence * q_seq + head * q_head
    key += sequence * k_seq + head // group * k_head
    value += sequence * v_seq + head // group * v_head
    q = tl.load(
        query + rows[:, None].to(tl.int64) * q_row + channels[None, :], mask=inside[:, None], other=0.0
    )
    sums = tl.zeros([M], tl.float32)
    largest = tl.full([M], -float("inf"), tl.float32)
    mixed = tl.zeros([M, D], tl.float32)
    begin, whole, end, stop = _key_blocks(at, lower, N)
    if DOCUMENTS:
        sums, largest, mixed = _forward_blocks(
            sums, largest, mixed, q, key, value, k_row, v_row, at, lower, scale, length, begin, whole,
            D, N, DOCUMENTS, True,
        )  # fmt: skip
    sums, largest, mixed = _forward_blocks(
        sums, largest, mixed, q, key, value, k_row, v_row, at, lower, scale, length, whole, end,
        D, N, DOCUMENTS, False,
    )  # fmt: skip
    sums, largest, mixed = _forward_blocks(
        sums, largest, mixed, q, key, value, k_row, v_row, at, lower, scale, length, end, stop,
        D, N, DOCUMENTS, True,
    )  # fmt: skip
    mixed = mixed / sums[:, None]
    place = (rows.to(tl.int64) * batch + sequence) * heads + head
    tl.store(
        out + place[:, None] * D + channels[None, :], mixed.to(out.dtype.element_ty), mask=inside[:, None]
    )
    tl.store(logsum + tl.program_id(1) * count + rows, largest + tl.log2(sums), mask=inside)


@triton.jit
def attention_deltas(
    out, grad, delta, count, batch, heads, g_row, g_seq, g_head, D: tl.constexpr, M: tl.constexpr
):
    """The sum over channels of output times its gradient, [b * heads, q]."""
    sequence, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows, channels = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    inside = rows[:, None] < count
    place = ((rows.to(tl.int64) * batch + sequence) * heads + head)[:, None] * D + channels[None, :]
    o = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    grad += sequence * g_seq + head * g_head
    g = tl.load(grad + rows[:, None].to(tl.int64) * g_row + channels[None, :], mask=inside, other=0.0)
    tl.store(delta + tl.program_id(1) * count + rows, tl.sum(o * g.to(tl.float32), 1), mask=rows < count)


@triton.jit
def _query_blocks(
    grad_q, q, g, logsum, delta, key, value, key_step, value_step, at, lower, scale, length, start, stop,
    D: tl.constexpr, N: tl.constexpr, DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, D)
    for block in range(start, stop):
        columns = block * N + tl.arange(0, N)
        known = columns[None, :] < length
        k = tl.load(key + columns[None, :].to(tl.int64) * key_step + channels[:, None], mask=known, other=0.0)
        v = tl.load(
            value + columns[None, :].to(tl.int64) * value_step + channels[:, None], mask=known, other=0.0
        )
        scores = _scores(q, k, scale, at, lower, columns, DOCUMENTS, MASKED)
        p = tl.exp2(scores - logsum[:, None])
        ds = p * (tl.dot(g, v, input_precision="tf32x3") - delta[:, None])
        grad_q += tl.dot(ds.to(k.dtype), tl.trans(k), input_precision="tf32x3")
    return grad_q


@triton.jit
def attention_query_gradient(
    query, key, value, grad, positions, since, logsum, delta, grad_query, scale, count, length, batch, heads,
    group, q_row, q_seq, q_head, k_row, k_seq, k_head, v_row, v_seq, v_head, g_row, g_seq, g_head,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    sequence, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows, channels = first + tl.arange(0, M), tl.arange(0, D)
    inside = rows < count
    at, lower = _queries(positions, since, first, count, batch, sequence, length, M, DOCUMENTS)
    query += sequence * q_seq + head * q_head
    grad += sequence * g_seq + head * g_head
    key += sequence * k_seq + head // group * k_head
    value += sequence * v_seq + head // group * v_head
    wide = rows[:, None].to(tl.int64)
    q = tl.load(query + wide * q_row + channels[None, :], mask=inside[:, None], other=0.0)
    g = tl.load(grad + wide * g_row + channels[None, :], mask=inside[:, None], other=0.0)
    log = tl.load(logsum + tl.program_id(1) * count + rows, mask=inside, other=0.0)
    row_delta = tl.load(delta + tl.program_id(1) * count + rows, mask=inside, other=0.0)
    gradient = tl.zeros([M, D], tl.float32)
    begin, whole, end, stop = _key_blocks(at, lower, N)
    if DOCUMENTS:
        gradient = _query_blocks(
            gradient, q, g, log, row_delta, key, value, k_row, v_row, at, lower, scale, length, begin, whole,
            D, N, DOCUMENTS, True,
        )  # fmt: skip
    gradient = _query_blocks(
        gradient, q, g, log, row_delta, key, value, k_row, v_row, at, lower, scale, length, whole, end,
        D, N, DOCUMENTS, False,
    )  # fmt: skip
    gradient = _query_blocks(
        gradient, q, g, log, row_delta, key, value, k_row, v_row, at, lower, scale, length, end, stop,
        D, N, DOCUMENTS, True,
    )  # fmt: skip
    gradient = gradient * (scale / LOG2_E)
    place = (wide * batch + sequence) * heads + head
    tl.store(
        grad_query + place * D + channels[None, :],
        gradient.to(grad_query.dtype.element_ty),
        mask=inside[:, None],
    )


@triton.jit
def _key_blocks_of_queries(
    grad_k, grad_v, k, v, query, grad, positions, since, logsum, delta, q_row, g_row, columns, scale, count,
    length, batch, sequence, start, stop,
    D: tl.constexpr, M: tl.constexpr, DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, D)
    for block in range(start, stop):
        rows = block * M + tl.arange(0, M)
        inside = rows < count
        wide = rows[None, :].to(tl.int64)
        q = tl.load(query + wide * q_row + channels[:, None], mask=inside[None, :], other=0.0)  # [d, m]
        g = tl.load(
            grad + rows[:, None].to(tl.int64) * g_row + channels[None, :], mask=inside[:, None], other=0.0
        )
        # rows past the last must weigh nothing: their gradient is 0 and so is their delta
        log = tl.load(logsum + rows, mask=inside, other=0.0)
        row_delta = tl.load(delta + rows, mask=inside, other=0.0)
        scores = tl.dot(k, q, input_precision="tf32x3") * scale  # [n, m]
        if MASKED:
            at, lower = _queries(positions, since, block * M, count, batch, sequence, length, M, DOCUMENTS)
            seen = columns[:, None] <= at[None, :]
            if DOCUMENTS:
                seen = seen & (columns[:, None] >= lower[None, :])
            scores = tl.where(seen & inside[None, :], scores, -float("inf"))
        p = tl.exp2(scores - log[None, :])
        grad_v += tl.dot(p.to(g.dtype), g, input_precision="tf32x3")
        ds = p * (tl.dot(v, tl.trans(g), input_precision="tf32x3") - row_delta[None, :])
        grad_k += tl.dot(ds.to(q.dtype), tl.trans(q), input_precision="tf32x3")
    return grad_k, grad_v


@triton.jit
def attention_key_gradient(
    query, key, value, grad, positions, since, logsum, delta, grad_key, grad_value, scale, count, length,
    batch, heads, group, q_row, q_seq, q_head, k_row, k_seq, k_head, v_row, v_seq, v_head,
    g_row, g_seq, g_head,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group
    sequence, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    first = tl.program_id(0) * N
    last = tl.minimum(first + N, length) - 1
    columns, channels = first + tl.arange(0, N), tl.arange(0, D)
    known = columns[:, None] < length
    key += sequence * k_seq + kv_head * k_head
    value += sequence * v_seq + kv_head * v_head
    k = tl.load(key + columns[:, None].to(tl.int64) * k_row + channels[None, :], mask=known, other=0.0)
    v = tl.load(value + columns[:, None].to(tl.int64) * v_row + channels[None, :], mask=known, other=0.0)

    # queries [begin, stop) see some of these keys, [whole, end) all of them
    begin, whole, end, stop = 0, 0, 0, 0
    for chunk in range(0, tl.cdiv(count, CHUNK)):
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        real = rows < count
        at = tl.load(positions + rows * batch + sequence, mask=real, other=0).to(tl.int32)
        begin += tl.sum((real & (at < first)).to(tl.int32), 0)
        whole += tl.sum((real & (at < last)).to(tl.int32), 0)
        if DOCUMENTS:
            lower = tl.load(since + sequence * length + at, mask=real, other=0).to(tl.int32)
            end += tl.sum((real & (lower <= first)).to(tl.int32), 0)
            stop += tl.sum((real & (lower <= last)).to(tl.int32), 0)
    if not DOCUMENTS:
        end = count
        stop = count
    last_block = tl.cdiv(stop, M)
    first_block = tl.minimum(begin // M, last_block)
    whole_block = tl.minimum(tl.cdiv(whole, M), last_block)
    end_block = tl.maximum(tl.where(end == count, last_block, end // M), whole_block)

    grad_k = tl.zeros([N, D], tl.float32)
    grad_v = tl.zeros([N, D], tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        queries = query + sequence * q_seq + head * q_head
        grads = grad + sequence * g_seq + head * g_head
        logs = logsum + (sequence * heads + head) * count
        deltas = delta + (sequence * heads + head) * count
        grad_k, grad_v = _key_blocks_of_queries(
            grad_k, grad_v, k, v, queries, grads, positions, since, logs, deltas, q_row, g_row, columns,
            scale, count, length, batch, sequence, first_block, whole_block, D, M, DOCUMENTS, True,
        )  # fmt: skip
        grad_k, grad_v = _key_blocks_of_queries(
            grad_k, grad_v, k, v, queries, grads, positions, since, logs, deltas, q_row, g_row, columns,
            scale, count, length, batch, sequence, whole_block, end_block, D, M, DOCUMENTS, False,
        )  # fmt: skip
        if DOCUMENTS:
            grad_k, grad_v = _key_blocks_of_queries(
                grad_k, grad_v, k, v, queries, grads, positions, since, logs, deltas, q_row, g_row, columns,
                scale, count, length, batch, sequence, end_block, last_block, D, M, DOCUMENTS, True,
            )  # fmt: skip
    grad_k = grad_k * (scale / LOG2_E)
    place = (columns[:, None].to(tl.int64) * batch + sequence) * kv_heads + kv_head
    tl.store(grad_key + place * D + channels[None, :], grad_k.to(grad_key.dtype.element_ty), mask=known)
    tl.store(grad_value + place * D + channels[None, :], grad_v.to(grad_value.dtype.element_ty), mask=known)
