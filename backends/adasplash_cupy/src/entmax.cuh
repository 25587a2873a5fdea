// The transform of one score, and the step towards its threshold.
//
// Units. With h = alpha - 1 and s = scale * q.k + bias, kernels work on x = h s where alpha is 1.5 or 2 and on x = s for any other
// alpha, which stays exact down to alpha = 1. A row's state is (m, c): m = max x, and c its distance to the threshold:
//
//     SQUARE (1.5), LINEAR (2):  c = m - tau                     a = [x - m + c]_+         p = a^(1/h)             u = p^(2-alpha)
//     POWER (any other):         c = -ln(h (m - tau_s)) / h      w = log1p(-h d e^(h c))/h - c,  d = m - x,   p = e^w,   u = e^((1-h) w)
//
// so that the c of POWER becomes log-sum-exp(x) - m at alpha = 1. m - 1 <= tau < m reads 0 < c <= 1, and c >= 0 for POWER.
//
// Newton on ||a||_(1/h) = 1 instead of on sum p = 1: the norm is convex and decreasing in tau, so steps from the left never pass the
// root, and it is nearly linear, so few are needed. With F = sum p and S = sum u the step is (F - F^(1-h)) / S; at alpha = 1 it is
// ln F, the exact answer.
#pragma once

enum Mode { POWER = 0, SQUARE = 15, LINEAR = 20 };

#define INFINITE ptx::float_of(0x7f800000u)  // NVRTC has no constant of it
inline constexpr float LOG2_E = 1.4426950408889634f;

// A row's state while its scores are visited. e is e^(h c) of POWER.
struct Point {
    float m, c, e;
};

// log1p(h y) / h and expm1(h y) / h, with their limit y at h = 0.
DEVICE float log1p_ratio(float y, float h) { return h > 0.f ? log1pf(fmaxf(h * y, -1.f + 6e-8f)) / h : y; }
DEVICE float expm1_ratio(float y, float h) { return h > 0.f ? expm1f(h * y) / h : y; }

// ALPHA is a Mode that the host knows, or 0: then alpha decides on the device.
template <class T, int ALPHA>
struct Entmax {
    float h, inverse_h;
    int mode_;

    DEVICE explicit Entmax(double alpha) {
        // In double where alpha is: alpha - 1 loses half the digits near 1 otherwise. Not fmin: NaN would become 1.
        double a = alpha - 1.0;
        h = ALPHA == SQUARE ? 0.5f : ALPHA == LINEAR ? 1.f : static_cast<float>(a < 0.0 ? 0.0 : a > 1.0 ? 1.0 : a);
        mode_ = h == 0.5f ? SQUARE : h == 1.f ? LINEAR : POWER;
        inverse_h = h > 0.f ? 1.f / h : 0.f;
    }

    DEVICE bool is(Mode mode) const { return ALPHA != 0 ? ALPHA == static_cast<int>(mode) : mode_ == static_cast<int>(mode); }
    DEVICE float unit() const { return is(POWER) ? 1.f : h; }
    DEVICE float first_c() const { return is(POWER) ? 0.f : 1.f; }  // of the bound tau >= m - 1, where every solve may start
    DEVICE Point point(float m, float c) const { return {m, c, is(POWER) ? expf(h * c) : 0.f}; }

    DEVICE void weigh(float x, const Point& at, float& p, float& u) const {
        if (is(SQUARE)) {
            u = ptx::positive((x - at.m) + at.c);
            p = u * u;
        } else if (is(LINEAR)) {
            p = ptx::positive((x - at.m) + at.c);
            u = p == 0.f ? 0.f : 1.f;
        } else if (sizeof(T) == 2 && h > 1e-3f) {
            // Two special functions an entry. The exponent's rounding is that of the logarithm over h: far below half precision.
            float t = ptx::positive(1.f + h * ((x - at.m) * at.e));
            float w = ptx::log2_fast(t) * inverse_h - LOG2_E * at.c;
            p = ptx::exp2_fast(w);
            u = t == 0.f ? 0.f : ptx::exp2_fast((1.f - h) * w);
        } else {
            float y = (x - at.m) * at.e;
            if (h * y <= -1.f) {
                p = u = 0.f;
            } else {
                float w = (h > 0.f ? log1pf(h * y) / h : y) - at.c;
                p = expf(w);
                u = expf((1.f - h) * w);
            }
        }
    }

    // p and u of a score over the threshold by `over` (SQUARE and LINEAR).
    DEVICE void weigh_over(float over, float& p, float& u) const {
        u = ptx::positive(over);
        p = u * u;
        if (is(LINEAR)) p = u, u = p == 0.f ? 0.f : 1.f;
    }

    // The next c from f = sum p and s = sum u; c itself where the row is empty.
    DEVICE float newton(float c, float f, float s) const {
        if (!(s > 0.f)) return s != s ? s : c;
        if (is(SQUARE)) return c - (f - sqrtf(f)) / s;
        if (is(LINEAR)) return c - (f - 1.f) / s;
        float step = -f * expm1_ratio(-logf(fmaxf(f, 1e-30f)), h) / s;
        return c - log1p_ratio(-step * expf(h * c), h);
    }

    // tau in units of x; -inf where every key counts (alpha = 1).
    DEVICE float threshold(float m, float c) const {
        if (!is(POWER)) return m - c;
        return h > 0.f ? m - expf(-h * c) / h : -INFINITE;
    }

    // tau in units of z = h s; the log-sum-exp of the scores at alpha = 1.
    DEVICE float tau(float m, float c) const {
        if (!is(POWER)) return m - c;
        return h > 0.f ? h * m - expf(-h * c) : m + c;
    }

};

// 1 / (1 - dropout_p) where the entry stays, else 0: Philox-4x32-7 at counter (key, row, head, 0), word 0.
DEVICE float dropout_factor(u64 seed, u32 keep_from, float keep_scale, int row, int key, int head) {
    u32 c0 = key, c1 = row, c2 = head, c3 = 0, k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 7; ++round) {
        u32 high0 = ptx::multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        u32 high1 = ptx::multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c0 >= keep_from ? keep_scale : 0.f;
}
