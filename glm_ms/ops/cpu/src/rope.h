// Rotary embedding of the first half of a head, in pairs of neighbouring channels.

// table [2][dim / 4] of one position: cosine, sine.
static inline void rotate(float* head, const float* table, int64_t dim) {
    const int64_t pairs = dim / 4;
    for (int64_t i = 0; i < pairs; ++i) {
        const float cosine = table[i], sine = table[pairs + i], x = head[2 * i], y = head[2 * i + 1];
        head[2 * i] = x * cosine + -y * sine;
        head[2 * i + 1] = y * cosine + x * sine;
    }
}
