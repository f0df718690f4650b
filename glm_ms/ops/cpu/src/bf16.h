// float32 to bfloat16, round to nearest even; NaN stays NaN.

// x [count] -> its bfloat16 values.
void to_bf16(const float* x, uint16_t* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] = bf16_of(x[i]);
}

// x [count] -> its bfloat16 values as float32.
void round_to_bf16(const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] = float_of_bits((uint32_t)bf16_of(x[i]) << 16);
}
