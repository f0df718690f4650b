// Inputs of an operator, read one after another in the order of its Python class.

// Storage of an array. ABSENT (bool in MindSpore): the network has none, for example no bias.
enum class Type { ABSENT, F32, F16, BF16, INT8, INT4 };

struct Array {
    const void* data;
    Type type;
    int dims;
    const int64_t* shape;

    explicit operator bool() const { return type != Type::ABSENT; }
};

static inline Type type_of(const char* name) {
    static const struct {
        const char* name;
        Type type;
    } known[] = {{"float32", Type::F32}, {"float16", Type::F16}, {"bfloat16", Type::BF16},
                 {"int8", Type::INT8},   {"uint8", Type::INT4}};
    for (const auto& one : known)
        if (!std::strcmp(name, one.name)) return one.type;
    return Type::ABSENT;
}

class Inputs {
public:
    explicit Inputs(const Call& call) : call_(call) {}

    Array next() {
        int at = place_++;
        return {call_.params[at], type_of(call_.types[at]), call_.dims[at], call_.shapes[at]};
    }
    template <class T>
    T* data() {
        return (T*)call_.params[place_++];
    }

private:
    const Call& call_;
    int place_ = 0;
};

// Numbers that a graph is built with, double [n].
class Numbers {
public:
    explicit Numbers(const double* values) : next_(values) {}
    int64_t integer() { return (int64_t)*next_++; }
    float real() { return (float)*next_++; }
    bool flag() { return *next_++ != 0; }

private:
    const double* next_;
};

// An array of any float type, read as float32; lanes from `count` on are zero.
static inline Vec load_as(const Array& array, int64_t at, int64_t count) {
    switch (array.type) {
        case Type::F32: return load((const float*)array.data + at, count);
        case Type::F16: return load_f16((const uint16_t*)array.data + at, count);
        case Type::BF16: return load_bf16((const uint16_t*)array.data + at, count);
        default: return zero();
    }
}

// The vector without the lanes from `count` on, which become zero.
static inline Vec first_lanes(Vec x, int64_t count) {
    if (count >= LANES) return x;
    float lanes[LANES];
    store(lanes, x);
    return load(lanes, count);
}
