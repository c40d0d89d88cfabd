// What the checker remembers of a word of memory.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace ptxsim {

// An access: who, when, which bytes of the word. 0: none. With kTag the low half is an index instead.
using Epoch = uint64_t;
constexpr Epoch kTag = Epoch{1} << 63, kStrong = Epoch{1} << 62, kProxyWrite = Epoch{1} << 61;

constexpr uint32_t kBlockBits = 18, kThreadBits = 11, kClockBits = 28;
constexpr Epoch kWhoMask = ((Epoch{1} << (kBlockBits + kThreadBits)) - 1) << 32;

inline uint32_t who_of(Epoch e) { return static_cast<uint32_t>((e & kWhoMask) >> 32); }
inline uint32_t block_of(Epoch e) { return static_cast<uint32_t>(e >> (32 + kThreadBits)) & ((1u << kBlockBits) - 1); }
inline uint32_t thread_of(Epoch e) { return static_cast<uint32_t>(e >> 32) & ((1u << kThreadBits) - 1); }
inline uint32_t clock_of(Epoch e) { return static_cast<uint32_t>(e >> 4) & ((1u << kClockBits) - 1); }
inline uint32_t bytes_of(Epoch e) { return static_cast<uint32_t>(e) & 15; }
inline Epoch make_epoch(uint32_t who, uint32_t clock, uint32_t bytes, Epoch flags) {
  return flags | Epoch{who} << 32 | Epoch{clock & ((1u << kClockBits) - 1)} << 4 | bytes;
}

struct Cell {
  Epoch w = 0, r = 0;
  uint32_t w_inst = 0, r_inst = 0;  // where in the program
};

// Writers of the single bytes of a word, if they are not the same.
struct ByteWriters {
  Epoch w[4];
};

// Readers of a word since its last write, if there are several: lanes of a warp at one time.
struct Readers {
  struct Entry {
    uint32_t warp;   // block and warp: who >> 5
    uint32_t clock;
    uint32_t lanes;
    uint8_t bytes;
    bool strong;
  };
  // A handful in place, the rest (of words that many warps read) behind it; beyond kMost the oldest knowledge is lost.
  static constexpr uint32_t kInline = 5, kMost = 64;
  uint32_t count = 0;
  Entry first[kInline];
  std::vector<Entry> more;

  Entry& operator[](uint32_t i) { return i < kInline ? first[i] : more[i - kInline]; }
  void clear() {
    count = 0;
    more.clear();
  }
  void add(const Entry& e) {
    if (count >= kMost) return;
    if (count < kInline) first[count] = e;
    else more.push_back(e);
    ++count;
  }
  void remove(uint32_t i) {
    (*this)[i] = (*this)[--count];
    if (count >= kInline) more.pop_back();
  }
};

template <class T>
class Pool {
 public:
  uint32_t take() {
    if (free_.empty()) {
      items_.emplace_back();
      return static_cast<uint32_t>(items_.size() - 1);
    }
    const uint32_t index = free_.back();
    free_.pop_back();
    return index;
  }
  void give(uint32_t index) { free_.push_back(index); }
  T& operator[](uint32_t index) { return items_[index]; }

 private:
  std::vector<T> items_;
  std::vector<uint32_t> free_;
};

// Cells of global memory, page by page.
class GlobalShadow {
 public:
  Cell* page(uint64_t address) {
    const uint64_t number = address >> 12;
    if (number == last_) return cells_;
    auto& page = pages_[number];
    if (page == nullptr) page = std::make_unique<Cell[]>(1024);
    last_ = number;
    return cells_ = page.get();
  }

 private:
  std::unordered_map<uint64_t, std::unique_ptr<Cell[]>> pages_;
  uint64_t last_ = ~uint64_t{0};
  Cell* cells_ = nullptr;
};

}  // namespace ptxsim
