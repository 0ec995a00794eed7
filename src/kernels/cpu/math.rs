//! Elementary functions on sixteen lanes.

use super::simd::Simd;

/// `e^x` within 2 units in the last place. 0 below -87.7, about 2e38 above 88.3; not-a-number stays.
#[inline(always)]
pub fn exp<S: Simd>(simd: S, x: S::F) -> S::F {
    // e^x = 2^n e^r with n an integer and |r| <= ln(2) / 2; e^r is a series. Where n is -127, 2^n has all bits clear: 0.
    // `max` returns its second operand if that is not a number.
    let zero = simd.splat(0.0);
    let x = simd.max(simd.splat(-88.03), x);
    let x = simd.sub(zero, simd.max(simd.splat(-88.3), simd.sub(zero, x)));
    let n = simd.round(simd.mul(x, simd.splat(std::f32::consts::LOG2_E)));
    let whole = simd.float_of_int(n);
    // ln(2) in two parts, so that r loses no bits.
    let r = simd.fma(whole, simd.splat(-0.693_359_4), x);
    let r = simd.fma(whole, simd.splat(2.121_944_4e-4), r);
    let mut series = simd.splat(1.0 / 5040.0);
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = simd.fma(series, r, simd.splat(coefficient));
    }
    simd.mul(series, simd.float_of_bits(simd.shl::<23>(simd.add_i(n, simd.splat_i(127)))))
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub fn silu<S: Simd>(simd: S, x: S::F) -> S::F {
    simd.div(x, simd.add(simd.splat(1.0), exp(simd, simd.sub(simd.splat(0.0), x))))
}

/// `x / 2 (1 + erf(x / sqrt(2)))` (Hendrycks and Gimpel 2016), to 2e-7 times `|x|` absolutely.
#[inline(always)]
pub fn gelu<S: Simd>(simd: S, x: S::F) -> S::F {
    // erf(z) = 1 - (a1 t + ... + a5 t^5) e^(-z^2), t = 1 / (1 + p z), for z >= 0 (Abramowitz and Stegun 7.1.26).
    let (zero, one) = (simd.splat(0.0), simd.splat(1.0));
    let size = simd.max(x, simd.sub(zero, x));
    let z = simd.mul(size, simd.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = simd.div(one, simd.fma(z, simd.splat(0.327_591_1), one));
    let mut series = simd.splat(1.061_405_4);
    for coefficient in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        series = simd.fma(series, t, simd.splat(coefficient));
    }
    let rest = simd.mul(simd.mul(series, t), exp(simd, simd.sub(zero, simd.mul(z, z))));
    // x/2 + |x|/2 erf(z), because erf is odd.
    let half = simd.splat(0.5);
    simd.mul(half, simd.add(x, simd.mul(size, simd.sub(one, rest))))
}

/// `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`, the same paper's approximation.
#[inline(always)]
pub fn gelu_tanh<S: Simd>(simd: S, x: S::F) -> S::F {
    let cube = simd.mul(simd.mul(x, x), simd.mul(x, simd.splat(0.044_715)));
    // x/2 (1 + tanh(y)) = x sigmoid(2y).
    let y = simd.mul(simd.add(x, cube), simd.splat(2.0 * 0.797_884_6));
    simd.div(x, simd.add(simd.splat(1.0), exp(simd, simd.sub(simd.splat(0.0), y))))
}

/// `(up + 1) * gate * sigmoid(alpha * gate)`, `gate` at most `limit` and `up` between `-limit` and `limit`.
#[inline(always)]
pub fn clamped_swiglu<S: Simd>(simd: S, gate: S::F, up: S::F, alpha: f32, limit: f32) -> S::F {
    let (zero, one, below) = (simd.splat(0.0), simd.splat(1.0), simd.splat(-limit));
    // The smaller of two is the larger of their negatives, negated; what is not a number stays.
    let gate = simd.sub(zero, simd.max(below, simd.sub(zero, gate)));
    let up = simd.sub(zero, simd.max(below, simd.sub(zero, simd.max(below, up))));
    let steep = exp(simd, simd.mul(gate, simd.splat(-alpha)));
    simd.mul(simd.add(up, one), simd.div(gate, simd.add(one, steep)))
}

/// Hyperbolic tangent, to 1e-7 absolutely.
#[inline(always)]
pub fn tanh<S: Simd>(simd: S, x: S::F) -> S::F {
    let one = simd.splat(1.0);
    let power = exp(simd, simd.add(x, x));
    simd.sub(one, simd.div(simd.splat(2.0), simd.add(power, one)))
}

/// Sine and cosine, to 1e-6 absolutely for magnitudes below a million (on the portable set below 100 000).
#[inline(always)]
pub fn sin_cos<S: Simd>(simd: S, x: S::F) -> (S::F, S::F) {
    // x = n pi/2 + r with |r| <= pi/4; pi/2 in three parts, the first of few bits, so that r loses none of its own.
    let n = simd.round(simd.mul(x, simd.splat(std::f32::consts::FRAC_2_PI)));
    let whole = simd.float_of_int(n);
    let r = simd.fma(whole, simd.splat(-1.570_312_5), x);
    let r = simd.fma(whole, simd.splat(-4.837_513e-4), r);
    let r = simd.fma(whole, simd.splat(-7.549_79e-8), r);
    let square = simd.mul(r, r);
    // Taylor series; the next terms are below 1e-8 at pi/4.
    let mut sine = simd.splat(1.0 / 362_880.0);
    for coefficient in [-1.0 / 5040.0, 1.0 / 120.0, -1.0 / 6.0, 1.0] {
        sine = simd.fma(sine, square, simd.splat(coefficient));
    }
    let sine = simd.mul(sine, r);
    let mut cosine = simd.splat(1.0 / 40_320.0);
    for coefficient in [-1.0 / 720.0, 1.0 / 24.0, -0.5, 1.0] {
        cosine = simd.fma(cosine, square, simd.splat(coefficient));
    }
    // Odd quarters exchange the two; signs repeat every four quarters.
    let one = simd.splat_i(1);
    let odd = simd.float_of_int(simd.and(n, one));
    let even = simd.sub(simd.splat(1.0), odd);
    let s = simd.mul(simd.fma(odd, cosine, simd.mul(even, sine)), sign(simd, n));
    let c = simd.mul(simd.fma(odd, sine, simd.mul(even, cosine)), sign(simd, simd.add_i(n, one)));
    (s, c)
}

/// Minus one where the second lowest bit is set, one elsewhere.
#[inline(always)]
fn sign<S: Simd>(simd: S, quarters: S::I) -> S::F {
    let negative = simd.float_of_int(simd.and(simd.shr::<1>(quarters), simd.splat_i(1)));
    simd.fma(negative, simd.splat(-2.0), simd.splat(1.0))
}
