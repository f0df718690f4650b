// What MindSpore's custom operators get: inputs first, then outputs.
#pragma once

#include <cstdint>

namespace glm {

struct Operands {
    void** data;
    const int* ranks;
    int64_t** shapes;

    template <class T>
    T* at(int index) const { return static_cast<T*>(data[index]); }
    float scalar(int index) const { return *at<float>(index); }
    int64_t size(int index) const {
        int64_t count = 1;
        for (int axis = 0; axis < ranks[index]; ++axis) count *= shapes[index][axis];
        return count;
    }
};

}  // namespace glm
