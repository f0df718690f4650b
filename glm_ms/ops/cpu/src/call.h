// Arguments of a custom operator of MindSpore, and the rows that an operator of the decoder computes.
#pragma once

#include <cstdint>

namespace glm {

// Inputs, then the output, in the order of the Python class.
struct Call {
    void** params;
    int* dims;
    int64_t** shapes;
    const char** types;
};

// Tokens of a page of keys and values.
constexpr int64_t PAGE = 16;

// A token of a sequence; glm_ms/ops/cpu/rows.py writes these tables.
struct Row {
    int64_t token;
    int64_t position;      // of the rotary embedding
    int64_t index;         // of its key in the sequence
    int64_t first;         // index of the first key that it sees; it sees all from there to its own
    const int32_t* pages;  // page of each PAGE keys of the sequence
    int64_t adapter;       // number in the tables of low-rank updates; 0: none
    float* logits;         // [V], where its logits go; null: nobody asks for them
    int64_t unused;
};

// Storage of keys and values.
enum class Stored : int64_t { F32, BF16, INT8 };

// What one run of the graph computes. The rows follow it in memory.
struct Run {
    int64_t count;        // rows that are computed; those behind them in the outputs are not written
    char* cache;          // pages of all layers
    int64_t layer_bytes;  // from a layer to the next one
    Stored stored;
    int32_t* finite;  // [count], 1 if a row has neither NaN nor infinity behind the last layer
    int64_t unused[3];

    const Row* rows() const { return (const Row*)(this + 1); }
};

static_assert(sizeof(Run) == sizeof(Row) && sizeof(Row) == 8 * sizeof(int64_t), "eight int64 a row");

}  // namespace glm
