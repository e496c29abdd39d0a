// The lists of unswag/lists.hpp, and that every row has every kernel.
#include "unswag/lists.hpp"

#include <gtest/gtest.h>

#include <set>

#include "matrix.hpp"

namespace unswag::test {
namespace {

template <class Enum>
void check_names() {
  std::set<std::string> names;
  for (const Enum value : every<Enum>()) {
    EXPECT_EQ(listed(value).value, value);
    names.insert(name_of(value));
  }
  EXPECT_EQ(names.size(), list_of(Enum{}).size());
  EXPECT_FALSE(names.contains(""));
  EXPECT_FALSE(is_listed(Enum(list_of(Enum{}).size())));
}

TEST(Lists, NamesAreUnique) {
  check_names<DType>();
  check_names<Mask>();
  check_names<Activation>();
  check_names<Block>();
}

TEST(Lists, SizesOfDtypesAreThoseOfTheirFormats) {
  for (const DType dtype : all_dtypes) EXPECT_EQ(listed(dtype).bytes, size_of(dtype)) << name_of(dtype);
}

TEST(Lists, EveryRowHasEveryKernel) {
  for (const Kernels* k : all_kernels()) {
#define KERNEL(entry, ...) EXPECT_NE(k->entry, nullptr) << k->name << " lacks " #entry;
    UNSWAG_KERNELS(KERNEL)
#undef KERNEL
  }
}

}  // namespace
}  // namespace unswag::test
