"""Sounds made from arithmetic, with AudioSet labels that are true by construction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000  # Hz

Waveform = NDArray[np.float32]
Random = np.random.Generator


@dataclass(frozen=True)
class Sound:
    """A recipe: `make(random, seconds)` gives a waveform, float32 [samples] in [-1, 1].

    `labels` are AudioSet display names, the most specific one first.
    """

    name: str
    labels: tuple[str, ...]
    make: Callable[[Random, float], NDArray[np.float64]]


def synthesise(sound: Sound, random: Random, duration_s: float) -> Waveform:
    """One instance of `sound`: random level, faint background noise, soft edges."""
    samples = int(duration_s * SAMPLE_RATE)
    wave = sound.make(random, duration_s)[:samples]
    peak = np.abs(wave).max(initial=0.0)
    if peak > 0.01:  # quieter than that is meant to be quiet
        level_dbfs = random.uniform(-25.0, -1.0)
        wave = wave / peak * 10 ** (level_dbfs / 20)
        wave = wave + random.normal(
            0.0, 10 ** (random.uniform(-90.0, level_dbfs - 45.0) / 20), samples
        )
        edge = min(samples // 4, int(random.uniform(0.0, 0.1) * SAMPLE_RATE))
        ramp = np.linspace(0.0, 1.0, edge)
        wave[:edge] *= ramp
        wave[samples - edge :] *= ramp[::-1]
    return np.clip(wave, -1.0, 1.0).astype(np.float32)


def _time(seconds: float) -> NDArray[np.float64]:
    return np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def _tone(time: NDArray[np.float64], *frequencies_hz: float) -> NDArray[np.float64]:
    return np.sum([np.sin(2 * np.pi * hz * time) for hz in frequencies_hz], axis=0)


def _sweep(frequency_hz: NDArray[np.float64]) -> NDArray[np.float64]:
    """A sine whose frequency follows `frequency_hz`, one value a sample."""
    return np.sin(2 * np.pi * np.cumsum(frequency_hz) / SAMPLE_RATE)


def _gate(time: NDArray[np.float64], period_s: float, on_s: float, start_s: float = 0.0) -> NDArray:
    return ((time - start_s) % period_s < on_s).astype(np.float64)


def _coloured_noise(random: Random, samples: int, exponent: float) -> NDArray[np.float64]:
    """Noise whose power falls with frequency to the given exponent (0 white, 1 pink)."""
    spectrum = np.fft.rfft(random.normal(size=samples))
    frequency = np.maximum(np.fft.rfftfreq(samples, 1 / SAMPLE_RATE), 20.0)
    return np.fft.irfft(spectrum / frequency ** (exponent / 2), samples)


def _impulses(random: Random, seconds: float, times_s: NDArray, pitches_hz: NDArray) -> NDArray:
    """Short damped ringings at the given times."""
    wave = np.zeros(int(seconds * SAMPLE_RATE))
    decay_s = random.uniform(0.003, 0.012)
    ring = _time(0.08)
    for start_s, hz in zip(times_s, pitches_hz, strict=True):
        click = np.exp(-ring / decay_s) * np.sin(2 * np.pi * hz * ring)
        start = int(start_s * SAMPLE_RATE)
        room = wave[start : start + len(click)]
        room += click[: len(room)]
    return wave


def _sine_wave(random: Random, seconds: float) -> NDArray[np.float64]:
    return _tone(_time(seconds), np.exp(random.uniform(np.log(120), np.log(4_000))))


def _chirp_tone(random: Random, seconds: float) -> NDArray[np.float64]:
    time = _time(seconds)
    low, high = random.uniform(100, 800), random.uniform(2_000, 7_000)
    sweep_s = random.uniform(0.8, 3.0)
    position = (time % sweep_s) / sweep_s
    if random.random() < 0.5:
        position = 1 - position
    return _sweep(low * (high / low) ** position)


def _white_noise(random: Random, seconds: float) -> NDArray[np.float64]:
    return random.normal(size=int(seconds * SAMPLE_RATE))


def _pink_noise(random: Random, seconds: float) -> NDArray[np.float64]:
    return _coloured_noise(random, int(seconds * SAMPLE_RATE), random.uniform(0.9, 1.3))


def _mains_hum(random: Random, seconds: float) -> NDArray[np.float64]:
    time, mains_hz = _time(seconds), random.choice([50.0, 60.0])
    harmonics = range(1, random.integers(4, 12))
    return np.sum(
        [random.uniform(0.1, 1) / n**0.7 * _tone(time, n * mains_hz) for n in harmonics], 0
    )


def _silence(random: Random, seconds: float) -> NDArray[np.float64]:
    # Digital silence half of the time, else what a quiet converter gives.
    level = 0.0 if random.random() < 0.5 else 10 ** (random.uniform(-95, -75) / 20)
    return level * random.normal(size=int(seconds * SAMPLE_RATE))


def _dial_tone(random: Random, seconds: float) -> NDArray[np.float64]:
    pairs = [(350.0, 440.0), (425.0,), (400.0, 450.0)]  # North America, Europe, Britain
    return _tone(_time(seconds), *pairs[random.integers(len(pairs))])


def _busy_signal(random: Random, seconds: float) -> NDArray[np.float64]:
    time, on_s = _time(seconds), random.choice([0.25, 0.375, 0.5])
    pair = (480.0, 620.0) if random.random() < 0.6 else (425.0,)
    return _tone(time, *pair) * _gate(time, 2 * on_s, on_s, random.uniform(0, on_s))


def _dtmf(random: Random, seconds: float) -> NDArray[np.float64]:
    time, key_s = _time(seconds), random.uniform(0.07, 0.2)
    period_s = key_s + random.uniform(0.04, 0.25)
    wave = np.zeros_like(time)
    for key in range(int(seconds / period_s) + 1):
        low = random.choice([697.0, 770.0, 852.0, 941.0])
        high = random.choice([1209.0, 1336.0, 1477.0])
        inside = (time >= key * period_s) & (time < key * period_s + key_s)
        wave[inside] = _tone(time[inside], low, high)
    return wave


def _telephone_bell(random: Random, seconds: float) -> NDArray[np.float64]:
    time, strikes_hz = _time(seconds), random.uniform(18, 26)
    bells = random.uniform(1_000, 1_500) * np.array([1.0, 1.25, 2.4, 3.1])
    strike = np.exp(-((time * strikes_hz) % 1) * random.uniform(1.0, 3.0))
    on_s = random.choice([0.4, 1.0, 2.0])
    return _tone(time, *bells) * strike * _gate(time, on_s * random.uniform(1.5, 3), on_s)


def _wail_siren(random: Random, seconds: float) -> NDArray[np.float64]:
    time = _time(seconds)
    low, high = random.uniform(200, 500), random.uniform(700, 1_300)
    position = 0.5 - 0.5 * np.cos(2 * np.pi * time / random.uniform(3, 9) + random.uniform(0, 6))
    phase = low + (high - low) * position
    return _sweep(phase) + 0.5 * _sweep(2 * phase) + 0.25 * _sweep(3 * phase)


def _police_siren(random: Random, seconds: float) -> NDArray[np.float64]:
    time = _time(seconds)
    low, high = random.uniform(500, 800), random.uniform(1_100, 1_800)
    rate_hz = random.uniform(0.8, 4.0)
    position = np.abs(2 * ((time * rate_hz + random.random()) % 1) - 1)
    phase = low + (high - low) * position
    return _sweep(phase) + 0.5 * _sweep(2 * phase) + 0.3 * _sweep(3 * phase)


def _beep(random: Random, seconds: float) -> NDArray[np.float64]:
    time, on_s = _time(seconds), random.uniform(0.05, 0.25)
    period_s = on_s + random.uniform(0.1, 0.8)
    return _tone(time, random.uniform(700, 2_200)) * _gate(time, period_s, on_s)


def _smoke_alarm(random: Random, seconds: float) -> NDArray[np.float64]:
    time = _time(seconds)
    pulses = sum(_gate(time, 4.0, 0.5, start_s) for start_s in (0.0, 1.0, 2.0))  # ISO 8201
    return _tone(time, random.uniform(2_800, 3_400)) * pulses


def _reversing_beeps(random: Random, seconds: float) -> NDArray[np.float64]:
    time, on_s = _time(seconds), random.uniform(0.4, 0.6)
    tone = np.sign(_tone(time, random.uniform(1_000, 1_500)))
    return tone * _gate(time, 2 * on_s, on_s, random.uniform(0, on_s))


def _alarm_clock(random: Random, seconds: float) -> NDArray[np.float64]:
    time, beep_s = _time(seconds), random.uniform(0.06, 0.09)
    beeps = sum(_gate(time, 1.0, beep_s, n * 2 * beep_s) for n in range(4))
    return np.sign(_tone(time, random.uniform(1_900, 2_600))) * beeps


def _buzzer(random: Random, seconds: float) -> NDArray[np.float64]:
    time, hz = _time(seconds), random.uniform(90, 240)
    saw = 2 * ((time * hz) % 1) - 1
    on_s = random.uniform(0.5, 1.5)
    return (saw + 0.5 * np.sign(_tone(time, 2 * hz))) * _gate(time, on_s * 1.5, on_s)


def _tick_tock(random: Random, seconds: float) -> NDArray[np.float64]:
    period_s = random.choice([0.25, 0.5, 1.0])
    times = np.arange(random.uniform(0, period_s), seconds, period_s)
    pitches = np.resize([random.uniform(2_000, 5_000), random.uniform(1_200, 3_500)], len(times))
    return _impulses(random, seconds, times, pitches)


def _clicking(random: Random, seconds: float) -> NDArray[np.float64]:
    count = max(2, int(seconds * random.uniform(2, 9)))
    times = np.sort(random.uniform(0, seconds, count))
    return _impulses(random, seconds, times, random.uniform(2_000, 5_500, count))


def _heartbeat(random: Random, seconds: float) -> NDArray[np.float64]:
    time, wave = _time(seconds), np.zeros(int(seconds * SAMPLE_RATE))
    beat_s = 60 / random.uniform(55, 110)
    for start_s in np.arange(0, seconds, beat_s):
        for offset_s, gain in ((0.0, 1.0), (0.3 * beat_s, 0.7)):
            age = time - start_s - offset_s
            thump = np.exp(-np.maximum(age, 0) / 0.05) * np.sin(2 * np.pi * 55 * age) * (age >= 0)
            wave += gain * thump
    return wave


SOUNDS = (
    Sound("sine-wave", ("Sine wave",), _sine_wave),
    Sound("chirp-tone", ("Chirp tone",), _chirp_tone),
    Sound("white-noise", ("White noise", "Static", "Noise"), _white_noise),
    Sound("pink-noise", ("Pink noise", "Noise"), _pink_noise),
    Sound("mains-hum", ("Mains hum", "Hum"), _mains_hum),
    Sound("silence", ("Silence",), _silence),
    Sound("dial-tone", ("Dial tone", "Telephone"), _dial_tone),
    Sound("busy-signal", ("Busy signal", "Telephone"), _busy_signal),
    Sound("dtmf", ("Telephone dialing, DTMF", "Telephone"), _dtmf),
    Sound("telephone-bell", ("Telephone bell ringing", "Telephone"), _telephone_bell),
    Sound("wail-siren", ("Civil defense siren", "Siren"), _wail_siren),
    Sound("police-siren", ("Police car (siren)", "Siren", "Emergency vehicle"), _police_siren),
    Sound("beep", ("Beep, bleep",), _beep),
    Sound("smoke-alarm", ("Smoke detector, smoke alarm", "Alarm"), _smoke_alarm),
    Sound("reversing-beeps", ("Reversing beeps", "Beep, bleep"), _reversing_beeps),
    Sound("alarm-clock", ("Alarm clock", "Alarm", "Clock"), _alarm_clock),
    Sound("buzzer", ("Buzzer", "Alarm"), _buzzer),
    Sound("tick-tock", ("Tick-tock", "Tick", "Clock"), _tick_tock),
    Sound("clicking", ("Clicking",), _clicking),
    Sound("heartbeat", ("Heart sounds, heartbeat",), _heartbeat),
)
