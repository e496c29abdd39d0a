// Keeps activations of many layers in a file while a forward pass runs, and reads them backwards, verified.
//
// usage: store [FOLDER]
#include "unswag/store.hpp"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr std::size_t layers = 24, values = 1 << 20;

void check(const unswag::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  constexpr std::int64_t bytes = values * sizeof(float);
  unswag::Store store;
  check(unswag::Store::open({.tier = unswag::Tier::disk, .dir = argc > 1 ? argv[1] : "", .limit = 2 * layers * bytes}, &store));

  std::vector<float> x(values, 1.0F);  // of one layer: the only one in memory
  std::vector<unswag::Store::Ticket> tickets(layers);
  for (std::size_t i = 0; i < layers; ++i) {
    check(store.put(x.data(), bytes, "float32 [1024, 1024]", &tickets[i]));
    for (float& value : x) value *= 1.5F;  // the next layer, in place: the store has its copy
  }
  std::printf("forward: %lld MiB stored, %lld MiB of buffers\n", static_cast<long long>(store.stats().bytes >> 20),
              static_cast<long long>(store.stats().buffers >> 20));

  float expected = x[0];
  for (std::size_t i = layers; i-- > 0;) {
    check(store.get(tickets[i], x.data()));
    if (i > 0) check(store.prefetch(tickets[i - 1]));
    expected /= 1.5F;
    for (const float value : x) {
      if (value < 0.999F * expected || value > 1.001F * expected) return 1;
    }
    check(store.drop(tickets[i]));
  }
  std::printf("backward: %zu layers read and verified\n", layers);
}
