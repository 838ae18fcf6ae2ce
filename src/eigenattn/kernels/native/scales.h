// What the bytes of scales stand for: see codebook.py.

#pragma once

#include <cmath>
#include <cstdint>

namespace {

constexpr int OCTAVE = 4, UNIT_SCALE = 128;

struct Scales {
    Scales() {
        for (int i = 0; i < 256; i++) of[i] = std::exp2(float(i - UNIT_SCALE) / OCTAVE);
    }
    float of[256];
};
const Scales SCALES;

}  // namespace
