// Keys and values in pages of PAGE tokens, which sequences may share.
//
// A page of a layer has for each group the keys [D][PAGE], then the values [PAGE][D padded to LANES]: so a vector
// of the scores of PAGE keys, and a vector of the mixed values, need no sum over lanes. int8 pages end with the
// scales of the keys and of the values, float32 [PAGE] each.

static inline int64_t item_bytes(Stored stored) { return stored == Stored::F32 ? 4 : stored == Stored::BF16 ? 2 : 1; }

// The keys or values of a page that is read soon: LANES of them are `step` bytes.
struct Following {
    const char* data;
    int64_t step;

    void prefetch(int64_t number) const { __builtin_prefetch(data + number * step); }
};

class Pages {
  public:
    Pages(const Run& run, int64_t layer, int64_t groups, int64_t dim)
        : base_(run.cache + layer * run.layer_bytes), stored_(run.stored), groups_(groups), dim_(dim),
          padded_(padded(dim)) {
        const int64_t scales = stored_ == Stored::INT8 ? 2 * PAGE * 4 : 0;
        group_bytes_ = PAGE * (dim_ + padded_) * item_bytes(stored_) + scales;
    }

    static int64_t padded(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }

    // Stores a key and a value [D] at a place of a page.
    void write(int64_t page, int64_t group, int64_t place, const float* key, const float* value) const {
        char* start = at(page, group), *values = start + PAGE * dim_ * item_bytes(stored_);
        if (stored_ == Stored::F32) {
            put((float *)(start) + place, key, PAGE, [](float x) { return x; });
            put((float *)(values) + place * padded_, value, 1, [](float x) { return x; });
        } else if (stored_ == Stored::BF16) {
            put((uint16_t *)(start) + place, key, PAGE, bf16_of);
            put((uint16_t *)(values) + place * padded_, value, 1, bf16_of);
        } else {
            float* scales = (float *)(values + PAGE * padded_);
            scales[place] = put_int8((int8_t *)(start) + place, key, PAGE);
            scales[PAGE + place] = put_int8((int8_t *)(values) + place * padded_, value, 1);
        }
    }

    // Keys [D][PAGE] of a page, written to `room` if they are not stored in this way.
    const float* keys(int64_t page, int64_t group, float* room) const {
        return expand(at(page, group), PAGE * dim_, room);
    }

    // Values [PAGE][padded(D)].
    const float* values(int64_t page, int64_t group, float* room) const {
        return expand(at(page, group) + PAGE * dim_ * item_bytes(stored_), PAGE * padded_, room);
    }

    Following following(int64_t page, int64_t group, bool values) const {
        const int64_t size = item_bytes(stored_);
        return {at(page, group) + (values ? PAGE * dim_ * size : 0), LANES * size};
    }

    // Scales of keys and of values, [2][PAGE]; null without any.
    const float* scales(int64_t page, int64_t group) const {
        if (stored_ != Stored::INT8) return nullptr;
        return (const float *)(at(page, group) + PAGE * (dim_ + padded_));
    }

  private:
    char* at(int64_t page, int64_t group) const { return base_ + (page * groups_ + group) * group_bytes_; }

    template <class T, class F> void put(T* to, const float* from, int64_t step, F converted) const {
        for (int64_t d = 0; d < dim_; ++d) to[d * step] = converted(from[d]);
    }

    // Symmetric: the largest magnitude becomes 127. Returns the scale, which is NaN or infinity if a number is.
    float put_int8(int8_t* to, const float* from, int64_t step) const {
        float largest = 0;
        bool sound = true;
        for (int64_t d = 0; d < dim_; ++d) {
            const float magnitude = std::fabs(from[d]);
            sound = sound && std::isfinite(magnitude);
            if (magnitude > largest) largest = magnitude;
        }
        const float scale = sound ? largest / 127 : NAN, factor = sound && largest > 0 ? 127 / largest : 0;
        for (int64_t d = 0; d < dim_; ++d)
            to[d * step] = sound ? (int8_t)(std::nearbyint(from[d] * factor)) : 0;
        return scale;
    }

    const float* expand(const char* from, int64_t count, float* room) const {
        if (stored_ == Stored::F32) return (const float *)(from);
        for (int64_t i = 0; i < count; i += LANES)
            store(room + i, stored_ == Stored::BF16 ? load_bf16((const uint16_t *)(from) + i)
                                                           : load_i8((const int8_t *)(from) + i));
        return room;
    }

    char* base_;
    Stored stored_;
    int64_t groups_, dim_, padded_, group_bytes_;
};
