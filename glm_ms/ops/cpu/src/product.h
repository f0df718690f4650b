// y = x W^T + bias for every weight format. A row has the same bits with any other rows, threads and instruction set.
void product(const Matrix& weight, const Rows& rows) {
    if (rows.count <= 0) return;
    switch (weight.format) {
        case Format::F32: return dense_product<WeightF32>(weight, rows);
        case Format::BF16: return dense_product<WeightBF16>(weight, rows);
        case Format::F16: return dense_product<WeightF16>(weight, rows);
        case Format::INT8: return int8_product(weight, rows);
        case Format::INT4: return int4_product(weight, rows);
    }
}
