// What every kernel is given. The host fills this struct by name (adasplash_cupy/params.py reads the declarations below, one a line):
// 8-byte fields first, so that there is no padding but at the end. Strides are in elements; head dims beyond the given ones are zero.
#pragma once

// What is counted: entries taken of `lists` and of `pool`, items that forward_select or forward_mark took, blocks in `queue`.
enum Counter { LISTED = 0, POOLED = 1, SELECTED = 2, QUEUED_ALL = 3, QUEUED_LISTS = 4 };

struct Params {
    const void* q;  // (batch, heads, q_len, head_dim)
    const void* k;  // (batch, kv_heads, kv_len, head_dim)
    const void* v;  // (batch, kv_heads, kv_len, head_dim_v)
    void* out;
    void* o2;            // (batch, heads, q_len, head_dim_v) contiguous: sum u v / sum u, for the backward
    float* m;            // (batch, heads, q_len), as are c, tau, support, t, margin and delta
    float* c;            // see entmax.cuh
    float* tau;          // null without statistics
    int* support;
    const double* alpha;         // () or (heads,)
    const int* lo;               // (1 or batch, q_len) visible keys lo <= j < hi of each row, or null: the rule of shift, left, right
    const int* hi;
    const int* diag;             // key position of each row's diagonal
    const u8* key_mask;          // (1 or batch, kv_len), 0 hides a key, or null
    const float* slopes;         // (heads,) or (batch, heads), or null
    const i64* seed;             // of dropout, or null
    u64* counters;               // of Counter; zeroed
    u32* key_max;                // (batch, kv_heads) max |k| as the bits of a float; zeroed
    float* t;                    // lower bound of tau, in units of x
    float* margin;               // by how much two roundings of a score may differ
    u16* hits;                   // marks of each program of the select pass, or of forward_mark
    int* entries;                // (batch, heads, q_blocks, 2) offset in `lists` and length, or one of Entry; null: all EVERY_KEY
    int* lists;
    int* queue;                  // blocks for forward_dense: those that walk all keys from the front, those with lists from the back
    int* blocks;                 // as entries, in `pool`: the keys that the backward walks; or null: none are kept
    int* pool;
    const void* d_out;           // (batch, heads, q_len, head_dim_v)
    float* delta;
    float* d_alpha;              // (batch, heads, q_blocks) or null
    void* d_q;
    void* d_k;
    void* d_v;
    float* dk_sum;               // (batch, kv_heads, kv_len, head_dim) zeroed, or null
    float* dv_sum;
    i64 q_batch, q_head, q_row;
    i64 k_batch, k_head, k_row;
    i64 v_batch, v_head, v_row;
    i64 out_batch, out_head, out_row;
    i64 d_out_batch, d_out_head, d_out_row;
    i64 d_q_batch, d_q_head, d_q_row;
    i64 d_k_batch, d_k_head, d_k_row;
    i64 d_v_batch, d_v_head, d_v_row;
    i64 alpha_head, mask_batch, key_mask_batch, slopes_batch;
    i64 lists_size, pool_size;
    int batch, heads, group;     // group: query heads a key head
    int q_len, kv_len, q_blocks;
    int head_dim, head_dim_v;
    int shift, left, right;      // row i sees max(0, i + shift - left) <= j < min(kv_len, i + shift + right + 1)
    int hit_words;               // of a program's marks: u16, or u32 a group of queries of forward_mark
    int sample, sample_steps;    // see bound.cuh
    int heads_together;          // whose blocks forward_mark takes in turn, so that their keys stay in the L2 cache
    int heads_in_turn;           // likewise forward_lists and forward_dense, with their values
    int list_percent, dense_percent, least_list;
    u32 keep_from;               // dropout keeps entries whose word is at least this
    float keep_scale;            // 1 / (1 - dropout_p)
    float scale, tol, sample_worth;
};
