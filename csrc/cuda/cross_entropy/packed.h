// Few classes: a thread a row, p.slice rows a tile. A tile passes through shared memory, there and
// back, so that memory is touched in whole words where rows lie side by side.
#pragma once

#include "common.h"

namespace fastopt::gpu {

template <class T, class TT, bool kMass>
struct Packed : CrossEntropy<T, TT, kMass> {
  using Base = CrossEntropy<T, TT, kMass>;
  using Base::Base, Base::kLabels, Base::kSize, Base::p, Base::weight;
  using Base::begin_block, Base::end_block, Base::offset, Base::row_of, Base::rows;
  using Base::close_row, Base::gradient_of, Base::label_at, Base::load_true_logit;
  using Base::logit_gradient, Base::write_results;
  using typename Base::A, typename Base::End, typename Base::Gradient, typename Base::Row;
  using typename Base::Stats;

  // A tile's rows of one tensor in shared memory, `pitch` elements apart: so far that the threads'
  // words lie in different banks where rows are whole words, else as in memory.
  template <class U>
  struct Tile {
    U* rows;
    int pitch;
    bool words;  // rows are whole words, and begin with one
  };
  template <class U>
  FASTOPT_MEMBER Tile<U> tile_of(char* memory, const U* first_row) const {
    constexpr int kPer = static_cast<int>(sizeof(Words) / sizeof(U));
    const int classes = static_cast<int>(p.classes);
    const bool words = classes % kPer == 0;
    return {reinterpret_cast<U*>(memory) + (words ? 0 : lead_of(first_row)),
            words ? packed_pitch(classes, kPer) : classes, words};
  }

  // visit(row of the tile, class) for this thread's share of its rows, n classes at a time.
  template <int n, class F>
  FASTOPT_MEMBER void for_my_pieces(int rows, const F& visit) const {
    const int pieces = static_cast<int>(p.classes) / n;
    if (pieces == 0) return;  // no classes
    const int row_step = block_size() / pieces, piece_step = block_size() % pieces;
    int row = thread_index() / pieces, piece = thread_index() % pieces;
    while (row < rows) {
      visit(row, piece * n);
      row += row_step;
      piece += piece_step;
      if (piece >= pieces) {
        piece -= pieces;
        ++row;
      }
    }
  }

  // Moves a tile: copy(n, in the tile, in memory) for n elements at a time, whole words where both
  // sides have them.
  template <class U, class F>
  FASTOPT_MEMBER void for_tile(const Tile<U>& tile, U* memory, const Strides& strides,
                               int64_t first, int rows, const F& copy) const {
    constexpr int kPer = static_cast<int>(sizeof(Words) / sizeof(U));
    U* const start = memory + offset(strides, first);
    const int64_t step = p.positions == 1 ? strides.batch : 0;  // from row to row, where it is one
    const bool aligned = is_aligned(start) && step * static_cast<int64_t>(sizeof(U)) % 16 == 0;
    if (tile.words && step != 0 && aligned) {
      for_my_pieces<kPer>(rows, [&](int row, int c) {
        copy(Shape<1, kPer>{}, tile.rows + row * tile.pitch + c, start + row * step + c);
      });
    } else if (!tile.words && step == p.classes && lead_of(start) == lead_of(tile.rows)) {
      const int count = rows * static_cast<int>(p.classes);
      for_my_elements<kPer, 1>(
          count, head_of(start, count), thread_index(), block_size(),
          [&](auto shape, int c, int) { copy(shape, tile.rows + c, start + c); });
    } else {
      for_my_pieces<1>(rows, [&](int row, int c) {
        copy(Shape<1, 1>{}, tile.rows + row * tile.pitch + c,
             memory + offset(strides, first + row) + c);
      });
    }
  }

  FASTOPT_MEMBER void packed() {
    begin_block();
    const int tile_rows = static_cast<int>(p.slice);
    char* const x_memory = shared_memory() + block_shared_bytes(sizeof(A));
    char* const t_memory = x_memory + packed_bytes(p.slice, p.classes, sizeof(T));
    T* const logits = static_cast<T*>(const_cast<void*>(p.logits));
    TT* const target = static_cast<TT*>(const_cast<void*>(p.probabilities));
    const auto copy_in = [](auto shape, auto* to, const auto* from) {
      copy_some<shape.count>(to, from, true);
    };
    const auto copy_out = [](auto shape, const auto* from, auto* to) {
      if constexpr (shape.count > 1) {
        store_words_streaming(to, load_words(from));
      } else {
        *to = *from;
      }
    };
    for (int64_t first = block_index() * tile_rows; first < rows();
         first += grid_size() * tile_rows) {
      const int64_t left = rows() - first;
      const int rows = static_cast<int>(left < tile_rows ? left : tile_rows);
      const Tile<T> x = tile_of(x_memory, logits + offset(p.logits_strides, first));
      for_tile(x, logits, p.logits_strides, first, rows, copy_in);
      Tile<TT> t{};
      if constexpr (!kLabels) {
        t = tile_of(t_memory, target + offset(p.target_strides, first));
        for_tile(t, target, p.target_strides, first, rows, copy_in);
      }
      wait_for_copies();
      sync_block();
      for (int i = thread_index(); i < rows; i += block_size())
        packed_row(first + i, x.rows + i * x.pitch, x.words, t.rows + i * t.pitch, t.words);
      sync_block();
      if (p.grad != nullptr) {
        for_tile(x, static_cast<T*>(p.grad), p.grad_strides, first, rows, copy_out);
        sync_block();  // before the next tile comes in its place
      }
    }
    end_block();
  }

  // A row in shared memory: its gradient takes its place.
  FASTOPT_MEMBER void packed_row(int64_t r, T* x, bool x_words, TT* t, bool t_words) {
    const int64_t label = label_at(r);
    const int classes = static_cast<int>(p.classes);
    // visit(Shape, c): the vectors of the row, then what is left.
    const auto for_classes = [&](const auto& visit) {
      int c = 0;
      for (; c + kSize <= classes; c += kSize) visit(Shape<1, kSize>{}, c);
      for (; c < classes; ++c) visit(Shape<1, 1>{}, c);
    };
    const auto load = [&](auto shape, int c, A* values) {
      load_some<shape.count, Cache::keep>(x + c, x_words, values);
    };
    const auto load_masses = [&](auto shape, int c, A* q) {
      if constexpr (kMass)
        this->template masses<shape.count, Cache::keep>(t, c, t_words, weight, c,
                                                        is_aligned(weight), q);
    };
    Stats stats = empty_stats<A>();
    for_classes([&](auto shape, int c) {
      A values[shape.count];
      load(shape, c, values);
      for (int k = 0; k < shape.count; ++k) stats.max = larger(values[k], stats.max);
    });
    for_classes([&](auto shape, int c) {
      A values[shape.count], q[shape.count] = {};
      load(shape, c, values);
      load_masses(shape, c, q);
      this->add_below_max(stats, values, q);
    });
    Row row = row_of(label);  // not before: the label has had time to arrive
    load_true_logit(row, x);
    const End end = close_row(stats, row);
    write_results(r, end);
    if (p.grad == nullptr) return;
    const Gradient g = gradient_of(row, end);
    for_classes([&](auto shape, int c) {
      A values[shape.count], q[shape.count] = {};
      load(shape, c, values);
      load_masses(shape, c, q);
      for (int k = 0; k < shape.count; ++k)
        values[k] = row.ignored ? A(0) : logit_gradient(g, values[k], q[k]);
      store_some<shape.count, Cache::keep>(x + c, x_words, values);
    });
    if (row.y >= 0) x[row.y] = from_acc<T>(g.of_true);
  }
};

template <class T, class TT, bool kMass>
FASTOPT_KERNEL void FASTOPT_BOUNDS(kParcelThreads, kThreadsPerSm<T> / kParcelThreads)
    cross_entropy_packed(FASTOPT_PARAMS CrossEntropyParams p) {
  Packed<T, TT, kMass>(p).packed();
}

}  // namespace fastopt::gpu
