// The transform of one score, and the step towards its threshold.
//
// Units. With h = alpha - 1 and s = scale * q.k + bias, kernels work on x = h s where alpha is 1.5 or 2 and on x = s for any other
// alpha, which stays exact down to alpha = 1. A row's state is (m, c): m is a reference near max x, and c places the threshold from it:
//
//     SQUARE (1.5), LINEAR (2):  c = m - tau               a = [x - m + c]_+                p = a^(1/h)        u = p^(2-alpha)
//     POWER (any other):         c = tau + 1 / r - m       t = [1 + r (x - m - c)]_+        p = t^(1/h)        u = p^(2-alpha) = p / t
//
// with r = h, and r = 1 where x = h s. The c of POWER is log-sum-exp(x) - m at alpha = 1. With m = max x, m - 1 <= tau < m reads
// 0 < c <= 1, and c >= 0 for POWER; c may be measured from any other reference, whose error is then that of x.
//
// Newton on ||a||_(1/h) = 1 instead of on sum p = 1: the norm is convex and decreasing in tau, so steps from the left never pass the
// root, and it is nearly linear, so few are needed. With F = sum p and S = sum u the step is (F - F^(1-h)) / S; at alpha = 1 it is
// ln F, the exact answer.
#pragma once

enum Mode { POWER = 0, SQUARE = 15, LINEAR = 20 };

#define INFINITE ptx::float_of(0x7f800000u)  // NVRTC has no constant of it
inline constexpr float LOG2_E = 1.4426950408889634f;

// A row's state while its scores are visited; e is 1 - r c of POWER, the t of x = m.
struct Point {
    float m, c, e;
};

// expm1(h y) / h, with its limit y at h = 0.
DEVICE float expm1_ratio(float y, float h) { return h > 0.f ? expm1f(h * y) / h : y; }

// How the weights of entries are computed, without a branch: EXACT to the last bits of float32, LOGS and SERIES to half precision.
enum class Form { SQUARE, LINEAR, EXACT, LOGS, SERIES };

// ALPHA is a Mode that the host knows, or 0: then alpha decides on the device.
template <class T, int ALPHA>
struct Entmax {
    // Half precision takes one form for every alpha that the host does not know, and another near 1.
    static constexpr bool HALF = sizeof(T) == 2 && ALPHA == 0;
    float h, inverse_h, rate, power;  // rate: r; power: of t in u, (1 - h) / h
    int mode_;

    DEVICE explicit Entmax(double alpha) {
        // In double where alpha is: alpha - 1 loses half the digits near 1 otherwise. Not fmin: NaN would become 1.
        double a = alpha - 1.0;
        h = ALPHA == SQUARE ? 0.5f : ALPHA == LINEAR ? 1.f : static_cast<float>(a < 0.0 ? 0.0 : a > 1.0 ? 1.0 : a);
        mode_ = h == 0.5f ? SQUARE : h == 1.f ? LINEAR : POWER;
        inverse_h = h > 0.f ? 1.f / h : 0.f;
        rate = mode_ == POWER ? h : 1.f;
        power = h < 1.f ? (1.f - h) * inverse_h : 1e-7f;  // never 0, so that 0 to this power is 0
    }

    // Which of the two states a row has, and which units.
    DEVICE bool is(Mode mode) const {
        return ALPHA != 0 ? ALPHA == static_cast<int>(mode) : HALF ? mode == POWER : mode_ == static_cast<int>(mode);
    }
    DEVICE float unit() const { return ALPHA == 0 && mode_ == POWER ? 1.f : h; }
    DEVICE float first_c() const { return is(POWER) ? 0.f : 1.f; }  // of the bound tau >= max z - 1, where every solve may start
    DEVICE bool series() const { return !(h > 4e-3f); }

    DEVICE Point point(float m, float c) const { return {m, c, 1.f - rate * c}; }

    // p and u of a score x; of a score that is `over` the threshold; and of the score factor * a, in fewer instructions, where neither
    // it nor m is huge.
    template <Form FORM>
    DEVICE void weigh_as(float x, const Point& at, float& p, float& u) const {
        float d = x - at.m;
        if constexpr (FORM == Form::SQUARE || FORM == Form::LINEAR) weigh_over<FORM>(d + at.c, p, u);
        else if constexpr (FORM == Form::LOGS) weigh_base(fmaf(d, rate, at.e), p, u);
        else weigh_distance<FORM>(d - at.c, p, u);
    }
    template <Form FORM>
    DEVICE void weigh_over(float over, float& p, float& u) const {
        if constexpr (FORM == Form::SQUARE) u = ptx::positive(over), p = u * u;
        else if constexpr (FORM == Form::LINEAR) p = ptx::positive(over), u = p == 0.f ? 0.f : 1.f;
        else if constexpr (FORM == Form::LOGS) weigh_base(rate * over, p, u);
        else weigh_distance<FORM>(over - inverse_h, p, u);
    }
    template <Form FORM>
    DEVICE void weigh_product(float a, float factor, const Point& at, float& p, float& u) const {
        if constexpr (FORM == Form::EXACT) weigh_as<FORM>(a * factor, at, p, u);
        else weigh_line<FORM>(a, factor, intercept<FORM>(at), p, u);
    }
    // The same in two steps, but for EXACT: what a row's state adds to factor * a, and then the entry.
    template <Form FORM>
    DEVICE float intercept(const Point& at) const {
        return FORM == Form::LOGS ? at.e - rate * at.m : FORM == Form::SERIES ? -at.m - at.c : at.c - at.m;
    }
    template <Form FORM>
    DEVICE void weigh_line(float a, float factor, float start, float& p, float& u) const {
        if constexpr (FORM == Form::LOGS) weigh_base(fmaf(a, factor * rate, start), p, u);
        else if constexpr (FORM == Form::SERIES) weigh_distance<FORM>(fmaf(a, factor, start), p, u);
        else weigh_over<FORM>(fmaf(a, factor, start), p, u);
    }

    template <Form FORM>
    struct Chosen {
        const Entmax& entmax;
        DEVICE void weigh(float x, const Point& at, float& p, float& u) const { entmax.template weigh_as<FORM>(x, at, p, u); }
        DEVICE void weigh_over(float over, float& p, float& u) const { entmax.template weigh_over<FORM>(over, p, u); }
        DEVICE void weigh_product(float a, float factor, const Point& at, float& p, float& u) const {
            entmax.template weigh_product<FORM>(a, factor, at, p, u);
        }
        DEVICE float intercept(const Point& at) const { return entmax.template intercept<FORM>(at); }
        DEVICE void weigh_line(float a, float factor, float start, float& p, float& u) const {
            entmax.template weigh_line<FORM>(a, factor, start, p, u);
        }
    };

    // body(chosen): the form is asked for once, and not with every entry that body visits.
    template <class Body>
    DEVICE void choose(Body&& body) const {
        if constexpr (HALF) {
            if (series()) body(Chosen<Form::SERIES>{*this});
            else body(Chosen<Form::LOGS>{*this});
        } else if (is(SQUARE)) {
            if constexpr (ALPHA != LINEAR) body(Chosen<Form::SQUARE>{*this});
        } else if (is(LINEAR)) {
            if constexpr (ALPHA != SQUARE) body(Chosen<Form::LINEAR>{*this});
        } else {
            if constexpr (ALPHA == 0) body(Chosen<Form::EXACT>{*this});
        }
    }

    DEVICE void weigh(float x, const Point& at, float& p, float& u) const {
        choose([&](auto chosen) { chosen.weigh(x, at, p, u); });
    }

    // The next c from f = sum p and s = sum u; c itself where the row is empty.
    DEVICE float newton(float c, float f, float s) const {
        if (!(s > 0.f)) return s != s ? s : c;
        if (is(SQUARE)) return c - divide(f - (sizeof(T) == 2 ? ptx::sqrt_fast(f) : sqrtf(f)), s);
        if (is(LINEAR)) return c - divide(f - 1.f, s);
        // Beyond float32 some score is over the threshold by far, and the root is farther than this.
        if (f == INFINITE) return c + unit() * expm1_ratio(64.f, h);
        return c - unit() * divide(f * expm1_ratio(-logf(fmaxf(f, 1e-30f)), h), s);
    }

    // tau in units of x; -inf where every key counts (alpha = 1).
    DEVICE float threshold(float m, float c) const { return !is(POWER) ? m - c : rate > 0.f ? (m + c) - 1.f / rate : -INFINITE; }

    // Whether a row may be solved from a threshold. Near alpha = 1 thresholds are so low that their rounding would tell.
    DEVICE bool starts_anywhere() const { return !is(POWER) || rate > 1e-4f; }
    // The state of a row whose threshold is t - margin; m is 0 where that is not finite.
    DEVICE void start(float t, float margin, float& m, float& c) const {
        bool finite = fabsf(t) < INFINITE;
        m = !finite ? 0.f : is(POWER) ? (t - margin) + 1.f / rate : t;
        c = is(POWER) ? 0.f : margin;
    }

    // tau in units of z = h s; the log-sum-exp of the scores at alpha = 1.
    DEVICE float tau(float m, float c) const { return !is(POWER) ? m - c : rate > 0.f ? rate * (m + c) - 1.f : m + c; }

private:
    DEVICE static float divide(float x, float by) { return sizeof(T) == 2 ? ptx::divide_fast(x, by) : x / by; }

    // From t of the head: two special functions an entry. What the logarithm rounds, 2^-22 / h, is below half precision.
    DEVICE void weigh_base(float t, float& p, float& u) const {
        t = ptx::positive(t);
        u = ptx::exp2_fast(ptx::log2_fast(t) * power);
        p = u * t;
    }
    // From y = x - m - c.
    template <Form FORM>
    DEVICE void weigh_distance(float y, float& p, float& u) const {
        if constexpr (FORM == Form::SERIES) {
            // The series of log1p(h y) / h is good wherever p > e^-30. -inf times h = 0 would be NaN.
            y = ptx::at_least(y, -1e30f);
            float z = h * y;
            u = ptx::exp2_fast(y * ((1.f - h) * LOG2_E) * (1.f - z * (0.5f - z * (1.f / 3 - z * 0.25f))));
            p = u * (1.f + z);
        } else if (h * y <= -1.f) {
            p = u = 0.f;
        } else {
            u = expf((1.f - h) * (h > 0.f ? log1pf(h * y) * inverse_h : y));
            p = h > 0.f ? u * (1.f + h * y) : u;
        }
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
