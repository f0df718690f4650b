// Attention of rows over the pages of their sequences.
//
// The keys of a sequence form blocks of BLOCK_KEYS, counted from key 0. Each query (a head of a row) takes the softmax
// of a block alone, and adds the blocks one after another (Milakov & Gimelshein 2018, arXiv:1805.02867). So its bits
// depend neither on other rows nor on how rows and blocks are divided among threads.

constexpr int64_t BLOCK_KEYS = 16 * PAGE;
// Queries whose sums are in registers at a time.
constexpr int64_t TOGETHER = 4;
// Queries of a tile: enough that a page is read from the first cache, few enough that their scores are in the second.
constexpr int64_t TILE = 64;

static_assert(PAGE == LANES, "a vector has the scores of a page");

// Scores [N][stride] of N queries [N][dim] and the keys [dim][PAGE] of a page. `following`: the next page that is read.
template <int N>
static inline void page_scores(const float* query, int64_t dim, const float* keys, float* scores, int64_t stride,
                               Following following) {
    Vec total[N];
    for (int q = 0; q < N; ++q) total[q] = zero();
    for (int64_t d = 0; d < dim; ++d) {
        following.prefetch(d);
        const Vec key = load(keys + d * PAGE);
        for (int q = 0; q < N; ++q) total[q] = fma(set1(query[q * dim + d]), key, total[q]);
    }
    for (int q = 0; q < N; ++q) store(scores + q * stride, total[q]);
}

// Adds weights [N][stride] times values [PAGE][width] of the places from `begin` to `end` to mixed [N][width].
// `following` as above.
template <int N>
static inline void page_mix(const float* weights, int64_t stride, const float* values, int64_t begin, int64_t end,
                            int64_t width, float* mixed, Following following) {
    for (int64_t i = 0; i < width; i += LANES) {
        Vec total[N];
        for (int q = 0; q < N; ++q) total[q] = load(mixed + q * width + i);
        for (int64_t t = begin; t < end; ++t) {
            following.prefetch(i + t);
            const Vec value = load(values + t * width + i);
            for (int q = 0; q < N; ++q) total[q] = fma(set1(weights[q * stride + t]), value, total[q]);
        }
        for (int q = 0; q < N; ++q) store(mixed + q * width + i, total[q]);
    }
}

// Calls f(first query, number of them as a constant) for the queries from `begin` to `end`, TOGETHER at a time.
template <class F>
static inline void by_queries(int64_t begin, int64_t end, F f) {
    int64_t q = begin;
    for (; q + TOGETHER <= end; q += TOGETHER) f(q, std::integral_constant<int, TOGETHER>());
    for (; q < end; ++q) f(q, std::integral_constant<int, 1>());
}

// e^x of one number.
static inline float exp_of(float x) {
    float lanes[LANES];
    store(lanes, exp(set1(x)));
    return lanes[0];
}

// Scores of the places [begin, end) become weights relative to the largest, which is returned; those beside them in the
// same pages become zero.
static inline float weigh(float* scores, int64_t begin, int64_t end, float* total) {
    const int64_t low = begin / PAGE * PAGE, high = (end + PAGE - 1) / PAGE * PAGE;
    for (int64_t t = low; t < begin; ++t) scores[t] = -INFINITY;
    for (int64_t t = end; t < high; ++t) scores[t] = -INFINITY;
    Vec largest = set1(-INFINITY), sums = zero();
    for (int64_t t = low; t < high; t += LANES) largest = max(load(scores + t), largest);
    const float top = max_of(largest);
    for (int64_t t = low; t < high; t += LANES) {
        const Vec weight = exp(load(scores + t) - set1(top));
        store(scores + t, weight);
        sums = sums + weight;
    }
    *total = sum(sums);
    return top;
}

// What queries have of the values so far: mixed [queries][width] for weights relative to `top`, whose sum is `total`.
struct Mixture {
    float *mixed, *top, *total;
    int64_t width;

    static int64_t floats(int64_t queries, int64_t width) { return queries * (width + 2); }

    Mixture(float* memory, int64_t queries, int64_t width)
        : mixed(memory), top(memory + queries * width), total(top + queries), width(width) {}

    // Query `to` becomes, or with `add` gets in addition, what query `from` of `other` has.
    void take(int64_t to, const Mixture& other, int64_t from, bool add) {
        float* mine = mixed + to * width;
        const float* theirs = other.mixed + from * width;
        if (!add) {
            std::memcpy(mine, theirs, width * sizeof(float));
            top[to] = other.top[from], total[to] = other.total[from];
            return;
        }
        const float peak = top[to] > other.top[from] ? top[to] : other.top[from];
        const float keep = exp_of(top[to] - peak), gain = exp_of(other.top[from] - peak);
        top[to] = peak;
        total[to] = total[to] * keep + other.total[from] * gain;
        for (int64_t i = 0; i < width; i += LANES)
            store(mine + i, fma(load(theirs + i), set1(gain), load(mine + i) * set1(keep)));
    }

    // out [dim] = mixed / total.
    void divide(int64_t query, float* out, int64_t dim) const {
        const Vec factor = set1(1 / total[query]);
        for (int64_t d = 0; d < dim; d += LANES)
            store(out + d, load(mixed + query * width + d) * factor, dim - d);
    }
};

// Rows that follow one another in a sequence, with the heads of one group.
struct Tile {
    const Row* rows;
    int64_t count, heads, group, dim;
    const float* query;  // [count][heads][dim], scaled and rotated

    int64_t first() const { return rows[0].first; }
    int64_t last() const { return rows[count - 1].index; }
    int64_t queries() const { return count * heads; }
    // Blocks from `first_block` to `last_block` have keys of its rows.
    int64_t first_block() const { return first() / BLOCK_KEYS; }
    int64_t last_block() const { return last() / BLOCK_KEYS; }
    // The first query that sees a key of a place, which is not before `first`.
    int64_t first_query(int64_t key) const { return key > rows[0].index ? (key - rows[0].index) * heads : 0; }
    // How many places of the page that starts at `key` a query sees.
    int64_t places(int64_t query, int64_t key) const { return smaller(rows[query / heads].index - key + 1, PAGE); }
};

// The keys and values of a block for all queries of a tile that see one of them: the others stay as they are.
static inline void attend_block(const Tile& tile, const Pages& pages, int64_t block, Mixture& to) {
    const int64_t start = block * BLOCK_KEYS, dim = tile.dim, width = to.width, queries = tile.queries();
    const int64_t begin = tile.first() > start ? tile.first() : start;
    const int64_t low = begin / PAGE, high = smaller(tile.last(), start + BLOCK_KEYS - 1) / PAGE;
    float* scores = scratch_of<float>(SCORES, queries * BLOCK_KEYS + PAGE * (dim + width));
    float *key_room = scores + queries * BLOCK_KEYS, *value_room = key_room + PAGE * dim;
    const auto pages_of = tile.rows[0].pages;
    // The queries bring the next page into the cache: of keys, then the first one of values, then of values.
    const auto following = [&](int64_t number, bool values) {
        const int64_t next = number < high ? number + 1 : values ? number : low;
        return pages.following(pages_of[next], tile.group, values || number == high);
    };
    for (int64_t number = low; number <= high; ++number) {
        const float* keys = pages.keys(pages_of[number], tile.group, key_room);
        const float* scales = pages.scales(pages_of[number], tile.group);
        float* at = scores + number * PAGE - start;
        const int64_t from = tile.first_query(number * PAGE);
        const Following next = following(number, false);
        by_queries(from, queries, [&](int64_t q, auto n) {
            page_scores<n>(tile.query + q * dim, dim, keys, at + q * BLOCK_KEYS, BLOCK_KEYS, next);
        });
        if (scales)
            for (int64_t q = from; q < queries; ++q)
                store(at + q * BLOCK_KEYS, load(at + q * BLOCK_KEYS) * load(scales));
    }
    const int64_t seen = tile.first_query(start);
    for (int64_t q = seen; q < queries; ++q) {
        const int64_t end = smaller(tile.rows[q / tile.heads].index - start + 1, BLOCK_KEYS);
        to.top[q] = weigh(scores + q * BLOCK_KEYS, begin - start, end, &to.total[q]);
        for (int64_t i = 0; i < width; i += LANES) store(to.mixed + q * width + i, zero());
    }
    for (int64_t number = low; number <= high; ++number) {
        const int64_t key = number * PAGE, from = tile.first_query(key), skipped = begin > key ? begin - key : 0;
        const float* values = pages.values(pages_of[number], tile.group, value_room);
        const float* scales = pages.scales(pages_of[number], tile.group);
        float* at = scores + key - start;
        if (scales)
            for (int64_t q = from; q < queries; ++q)
                store(at + q * BLOCK_KEYS, load(at + q * BLOCK_KEYS) * load(scales + PAGE));
        const Following next = following(number, true);
        by_queries(from, queries, [&](int64_t q, auto n) {
            float *weights = at + q * BLOCK_KEYS, *mixed = to.mixed + q * width;
            const int64_t end = tile.places(q, key);
            if (end == tile.places(q + n - 1, key))
                return page_mix<n>(weights, BLOCK_KEYS, values, skipped, end, width, mixed, next);
            for (int i = 0; i < n; ++i)
                page_mix<1>(weights + i * BLOCK_KEYS, BLOCK_KEYS, values, skipped, tile.places(q + i, key), width,
                            mixed + i * width, next);
        });
    }
}

// out [count][stride]: the heads of the group side by side, behind those of the groups before it.
static inline void write_tile(const Tile& tile, const Mixture& all, float* out, int64_t stride) {
    out += tile.group * tile.heads * tile.dim;
    for (int64_t q = 0; q < tile.queries(); ++q)
        all.divide(q, out + q / tile.heads * stride + q % tile.heads * tile.dim, tile.dim);
}

// A tile over all of its blocks: out as of `write_tile`.
static inline void attend_tile(const Tile& tile, const Pages& pages, float* out, int64_t stride) {
    const int64_t width = Pages::padded(tile.dim), queries = tile.queries();
    float* memory = scratch_of<float>(ATTENTION, 2 * Mixture::floats(queries, width));
    Mixture all(memory, queries, width), one(memory + Mixture::floats(queries, width), queries, width);
    for (int64_t block = tile.first_block(); block <= tile.last_block(); ++block) {
        attend_block(tile, pages, block, one);
        for (int64_t q = tile.first_query(block * BLOCK_KEYS); q < queries; ++q)
            all.take(q, one, q, block > tile.first_block());
    }
    write_tile(tile, all, out, stride);
}

// Tiles of the rows of a run.
struct Tiles {
    const Row* rows;
    int64_t *first, *size;  // first row and rows of each, [count]
    int64_t count, heads, groups, dim;
    const float* query;  // [tile][groups][rows of the tile][heads][dim]

    int64_t width() const { return groups * heads * dim; }

    Tile at(int64_t tile, int64_t group) const {
        const float* from = query + first[tile] * width() + group * size[tile] * heads * dim;
        return {rows + first[tile], size[tile], heads, group, dim, from};
    }
};

// Fills `tiles` with the longest tiles of `count` rows.
static inline void divide_rows(int64_t count, Tiles& tiles) {
    tiles.count = 0;
    for (int64_t row = 0; row < count; ++row) {
        const Row *one = tiles.rows + row, *before = one - 1;
        const bool joins = row > 0 && (tiles.size[tiles.count - 1] + 1) * tiles.heads <= TILE &&
                           one->pages == before->pages && one->first == before->first &&
                           one->index == before->index + 1;
        if (joins)
            ++tiles.size[tiles.count - 1];
        else
            tiles.first[tiles.count] = row, tiles.size[tiles.count++] = 1;
    }
}

// Every block of every tile alone, then their sums: for few rows, which have fewer tiles than there are threads.
static inline void attend_by_blocks(const Tiles& tiles, const Pages& pages, float* out) {
    struct Piece {
        int64_t tile, group, block, place;
    };
    const int64_t width = Pages::padded(tiles.dim);
    int64_t count = 0, floats = 0;
    for (int64_t i = 0; i < tiles.count; ++i) {
        const Tile tile = tiles.at(i, 0);
        const int64_t some = tiles.groups * (tile.last_block() - tile.first_block() + 1);
        count += some, floats += some * Mixture::floats(tile.queries(), width);
    }
    Piece* pieces = scratch_of<Piece>(PIECES, count);
    float* memory = scratch_of<float>(MIXTURES, floats);
    int64_t piece = 0, place = 0;
    for (int64_t i = 0; i < tiles.count; ++i)
        for (int64_t group = 0; group < tiles.groups; ++group) {
            const Tile tile = tiles.at(i, group);
            for (int64_t block = tile.first_block(); block <= tile.last_block(); ++block) {
                pieces[piece++] = {i, group, block, place};
                place += Mixture::floats(tile.queries(), width);
            }
        }
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Tile tile = tiles.at(pieces[i].tile, pieces[i].group);
            Mixture one(memory + pieces[i].place, tile.queries(), width);
            attend_block(tile, pages, pieces[i].block, one);
        }
    });
    for (int64_t i = 0; i < count;) {
        const Tile tile = tiles.at(pieces[i].tile, pieces[i].group);
        Mixture all(memory + pieces[i].place, tile.queries(), width);
        for (++i; i < count && pieces[i].block > tile.first_block(); ++i) {
            const Mixture one(memory + pieces[i].place, tile.queries(), width);
            for (int64_t q = tile.first_query(pieces[i].block * BLOCK_KEYS); q < tile.queries(); ++q)
                all.take(q, one, q, true);
        }
        write_tile(tile, all, out + (tile.rows - tiles.rows) * tiles.width(), tiles.width());
    }
}

// The rows of a run -> out [rows][groups * heads * dim].
static inline void attend_tiles(const Tiles& tiles, const Pages& pages, float* out) {
    constexpr int64_t worth = 200000;  // multiplications for which it is worth to wake a thread, about 20 us
    int64_t work = 0;
    for (int64_t i = 0; i < tiles.count; ++i)
        work += 2 * tiles.size[i] * tiles.width() * (tiles.at(i, 0).last() - tiles.at(i, 0).first() + 1);
    const int64_t parts = tiles.count * tiles.groups;
    if (work > 2 * worth && parts < 4 * threads()) return attend_by_blocks(tiles, pages, out);
    parallel_for(parts, 1 + worth * parts / (1 + work), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Tile tile = tiles.at(i / tiles.groups, i % tiles.groups);
            attend_tile(tile, pages, out + (tile.rows - tiles.rows) * tiles.width(), tiles.width());
        }
    });
}
