"""
Video files and pictures, in and out: FFmpeg through pipes, nothing else.

Reading   video_info, survey, stream, read_video, read_image, files_in
Writing   write_video for a clip in memory; Unfinished for an output that is made piece by piece

Frames are uint8 (F, H, W, 3) RGB, upright. Rates are exact Fractions. What cannot be read or written is a ValueError
of one line that starts with the file's name.
"""
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache, wraps
from io import BytesIO
from itertools import chain
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageCms, ImageOps

try:
    import fcntl
except ImportError:                                      # Windows has none: there two runs are not kept apart
    fcntl = None

VIDEOS = {".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".flv",
          ".3gp", ".gif"}
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
VIDEO = "0:V:0"                                          # FFmpeg: the first video that is not the cover of a record

# ----------------------------------------------------------------------------
# reading


def command(args):
    """FFmpeg's command line; a Path among args is a file, even if its name has a colon, as in 12:30.mp4."""
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error",
            *(f"file:{x}" if isinstance(x, Path) else str(x) for x in args)]


def ffmpeg(args, stdin=b"", problems=None):
    """Standard output of FFmpeg run with `args`; ValueError with the last line of its complaint if it fails.

    problems: a list that takes the complaints of a run that ended well all the same.
    """
    done = subprocess.run(command(args), input=stdin, capture_output=True)
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode:
        raise ValueError("no video in it" if "matches no streams" in " ".join(lines) else
                         (lines or ["no reason given"])[-1])
    if problems is not None:
        problems += lines
    return done.stdout


def once_per_file(function):
    """Call function(path) once per state of the file; ValueError if there is no file."""
    @lru_cache(4096)
    def cached(path, size, mtime):
        return function(path)

    @wraps(function)
    def wrapped(path):
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        return dict(cached(path, path.stat().st_size, path.stat().st_mtime_ns))
    return wrapped


@once_per_file
def video_info(path):
    """dict(width, height, fps, aspect) of the first video stream, turned upright; aspect "1:1" is square pixels."""
    one = ["-map", VIDEO, "-frames:v", "1", "-pix_fmt", "yuv420p", "-f", "yuv4mpegpipe", "-"]
    try:
        # the header of a YUV4MPEG stream states size (after rotation), frame rate and aspect as ratios
        head = ffmpeg(["-i", path, *one])[:200].split(b"\n")[0].decode()
        w, h, num, den = re.search(r" W(\d+) H(\d+) F(\d+):(\d+)", head).groups()
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{path}: not readable as a video, or cut short ({e})") from None
    aspect = re.search(r" A([1-9]\d*:[1-9]\d*)", head)
    return dict(width=int(w), height=int(h), fps=Fraction(int(num), int(den)), aspect=aspect[1] if aspect else "1:1")


@once_per_file
def survey(path):
    """Decode a video once, small: dict(frames, cuts, times, problem).

    frames: how many can be read. cuts: the frames with which a new shot begins (FFmpeg's scdet, threshold 10 %).
    times: seconds at which frames are shown, one per frame. problem: what the decoder complained about, or "".
    """
    problems = []
    try:
        text = ffmpeg(["-i", path, "-map", VIDEO, "-vf", "scale=160:-2,scdet=threshold=10,metadata=print:file=-",
                       "-fps_mode", "passthrough", "-enc_time_base", "1:90000", "-f", "null", "-"],
                      problems=problems).decode()
    except ValueError as e:
        raise ValueError(f"{path}: not readable as a video ({e})") from None
    times, cuts = [], []
    for line in text.splitlines():
        if line.startswith("frame:"):
            times.append(float(line.rsplit("pts_time:", 1)[1]))
        elif line.startswith("lavfi.scd.time"):                 # printed for cuts alone
            cuts.append(len(times) - 1)
    if not times:
        raise ValueError(f"{path}: not readable as a video ({(problems or ['no frames'])[-1]})")
    return dict(frames=len(times), cuts=cuts, times=times, problem=problems[-1] if problems else "")


@once_per_file
def header(path):
    """What a file says of its first video: dict(seeks, lossless, matrix, hdr).

    seeks: FFmpeg finds a time in this container exactly. lossless: the codec loses nothing. matrix: that of its colours
    is stated. hdr: its name for the transfer curve of HDR video (PQ or HLG), or "".
    """
    said = subprocess.run(command(["-v", "info", "-i", path]), input=b"", capture_output=True).stderr
    said = said.decode(errors="replace")
    line = next((x for x in said.splitlines() if re.match(r"\s*Stream #0:.*?: Video: ", x)
                 and "(attached pic)" not in x), "")                     # not a title with these words
    hdr = re.search(r"/(smpte2084|arib-std-b67)\b", line)
    return dict(seeks=bool(re.search(r"Input #0, (mov|matroska),", said)),
                lossless=bool(re.search(r"Video: (ffv1|huffyuv|ffvhuff|utvideo|rawvideo|png|bmp)\b", line)),
                matrix=bool(re.search(r"[(,] ?(gbr|bt709|fcc|bt470bg|smpte170m|smpte240m|ycgco|bt2020n?c)[/,)]", line)),
                hdr=hdr[1] if hdr else "")


def steady(times, fps):
    """Whether frames are shown at a constant rate: none is off by more than a quarter of a frame."""
    n = np.arange(len(times))
    return bool(np.abs(np.array(times) - times[0] - n / float(fps)).max() < 0.25 / float(fps))


def stream(path, start=0, size=None):
    """The frames of a video from `start` on, one uint8 (H, W, 3) after the other; size (W, H): shrunk by area.

    FFmpeg decodes from the key frame before, or, where it finds that by guessing (.avi, .ts), from the first, and what
    is early is dropped; when frames are shown, `survey` knows. Colours are those of the file's tags; without any, about
    as players guess, bt709 if the shorter side is over 576 or the longer one 1280 and more, else bt601. HDR is
    tone-mapped: 203 cd/m2 is white (BT.2408).
    """
    info, about = video_info(path), header(path)
    short, long = sorted((info["width"], info["height"]))
    w, h = size or (info["width"], info["height"])
    seek, early = [], start
    if start and about["seeks"]:                            # to between two frames: at any rate, however late the first
        early, times = 0, survey(path)["times"]
        if start >= len(times):
            return
        seek = ["-ss", f"{(times[start - 1] + times[start]) / 2:.6f}"]
    # the flags avoid a rounding bias and nearest-neighbour chroma
    filters = f"scale={w}:{h}:flags={'area' if size else 'bicubic'}+accurate_rnd+full_chroma_int+full_chroma_inp"
    if about["hdr"]:
        filters = (f"setparams=colorspace=bt2020nc:color_primaries=bt2020:color_trc={about['hdr']},"
                   "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:desat=0,"
                   f"zscale=t=bt709:m=bt709:r=tv,format=yuv444p16le,{filters}:in_color_matrix=bt709")
    elif not about["matrix"] and (short > 576 or long >= 1280):
        filters += ":in_color_matrix=bt709"
    cmd = command([*seek, "-i", Path(path), "-map", VIDEO, "-vf", filters, "-fps_mode", "passthrough",
                   "-pix_fmt", "rgb24", "-f", "rawvideo", "-"])
    # its complaints were heard by video_info, and by survey; without a stdin of its own it would read the user's
    with subprocess.Popen(cmd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as decoder:
        try:
            while len(raw := decoder.stdout.read(3 * w * h)) == 3 * w * h:
                if early:
                    early -= 1
                    continue
                yield np.frombuffer(raw, np.uint8).reshape(h, w, 3)
        finally:
            decoder.kill()


def read_video(path, start=0, frames=None, size=None):
    """Frames start..start+frames-1 (None: to the end), uint8 (F, H, W, 3) RGB; size (W, H): shrunk by area."""
    found = []
    for frame in stream(path, start, size):
        found.append(frame)
        if len(found) == frames:
            break
    if not found:
        raise ValueError(f"{path}: no frame at {start}")
    return np.stack(found)


def to_srgb(im, profile):
    """A picture of PIL whose colours are those of an ICC profile, in sRGB; as it is if the profile is of no use."""
    try:
        return ImageCms.profileToProfile(im, ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"),
                                         outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return im


def read_image(path):
    """A picture as uint8 (H, W, 3) RGB, turned upright, from its own colour profile to sRGB."""
    try:
        with Image.open(path) as im:
            if getattr(im, "n_frames", 1) > 1 and im.format in ("PNG", "WEBP"):
                raise ValueError("an animation: make it a video first")
            profile, im = im.info.get("icc_profile"), ImageOps.exif_transpose(im)
            if im.mode in ("RGBA", "P", "PA"):
                im = im.convert("RGB")
            if profile and im.mode in ("RGB", "CMYK"):
                im = to_srgb(im, profile)
            if im.mode[0] == "I":                        # 16 bits of grey, which PIL would cut off at 255
                im = Image.fromarray((np.asarray(im) / 257).round().clip(0, 255).astype(np.uint8))
            return np.array(im.convert("RGB"))
    except Exception as e:                               # PIL raises many types for a broken file
        raise ValueError(f"{path}: not readable as a picture ({e})") from None


def numbered(files):
    """Whether these files are pictures whose names differ in numbers alone: the frames of one clip."""
    names = {re.sub(r"\d+", "#", path.name) for path in files}
    return files[0].suffix.lower() in IMAGES and len(names) == 1 and "#" in names.pop()


def files_in(folder, suffixes):
    """The files of a folder that end so, hidden ones left out, sorted with numbers in their order (2 before 10)."""
    def natural(path):
        return [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", path.name)]
    return sorted((p for p in Path(folder).iterdir()
                   if p.suffix.lower() in suffixes and p.name[0] != "." and p.is_file()), key=natural)


# ----------------------------------------------------------------------------
# writing


def ticks(times):
    """FFmpeg's expression for the time of frame N, in 1/90000 s: a tree of ifs, as FFmpeg nests no more than 100."""
    if len(times) == 1:
        return str(round(90000 * times[0][1]))
    half = len(times) // 2
    return f"if(lt(N,{times[half][0]}),{ticks(times[:half])},{ticks(times[half:])})"


def encode(path, frames, fps, crf=10, aspect="1:1", times=None):
    """Write frames, any iterable of uint8 (H, W, 3), to path; .mkv: lossless FFV1 in RGB, else H.264 tagged bt709.

    Untagged video would be read as bt709 by most players and as bt601 by others, which moves colours by up to 40
    levels. times: seconds of each frame, for a rate that varies. There are no B-frames, so that a frame's time is
    its place in the file.
    """
    frames = iter(frames)
    first = np.asarray(next(frames, np.zeros(0)))
    if first.ndim != 3 or first.shape[2] != 3 or first.dtype != np.uint8:
        raise ValueError(f"{path}: frames are uint8 (H, W, 3), not {first.dtype} {first.shape}")
    h, w, _ = first.shape
    filters = [f"setsar={aspect.replace(':', '/')}"]
    clock = []
    if times is not None:
        clock = ["-fps_mode", "passthrough", "-enc_time_base", "1:90000"]
        filters += ["settb=1/90000", f"setpts='{ticks(list(enumerate(times)))}'"]
    if Path(path).suffix.lower() == ".mkv":
        codec = ["-c:v", "ffv1", "-pix_fmt", "gbrp"]
    else:
        filters += ["scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int",
                    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"]
        pixels = "yuv444p" if h % 2 or w % 2 else "yuv420p"           # 4:2:0 halves both sides
        codec = ["-c:v", "libx264", "-crf", crf, "-bf", "0", "-pix_fmt", pixels]
    cmd = command(["-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}", "-framerate", fps, "-i", "-",
                   "-vf", ",".join(filters), *codec, *clock, "-movflags", "+faststart", Path(path)])
    with tempfile.TemporaryFile() as log:                 # a file, not a pipe: nobody reads it while we write
        encoder = subprocess.Popen(cmd, stdin=subprocess.PIPE, stderr=log)
        try:
            for x in chain([first], map(np.asarray, frames)):
                if x.shape != first.shape or x.dtype != np.uint8:
                    raise ValueError(f"{path}: a frame is {x.dtype} {x.shape}, the first is {first.shape}")
                encoder.stdin.write(np.ascontiguousarray(x).data)
            encoder.stdin.close()
        except BrokenPipeError:
            pass                                          # FFmpeg gave up: its own words follow
        except BaseException:
            encoder.kill()
            raise
        finally:
            code = encoder.wait()
        if code:
            log.seek(0)
            reason = log.read().decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise ValueError(f"{path}: not written ({reason[-1]})")


@contextmanager
def whole(path):
    """A name in the same folder to write to: it becomes path when the block ends well, and is gone when it does not."""
    path = Path(path)
    tmp = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield tmp
        os.replace(tmp, path)
    except ValueError as e:
        raise ValueError(str(e).replace(str(tmp), str(path))) from None
    finally:
        tmp.unlink(missing_ok=True)


def write_video(path, frames, fps, crf=10):
    """encode() frames to path, which appears only when it is whole."""
    with whole(path) as tmp:
        encode(tmp, frames, Fraction(fps).limit_denominator(100000), crf)


def write_image(path, frame):
    """Write uint8 (H, W, 3) to path, which appears only when it is whole."""
    try:
        with whole(path) as tmp:
            Image.fromarray(frame).save(tmp)
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not written ({e})") from None


class Unfinished:
    """An output made piece by piece: a hidden folder beside it, which becomes the output when all pieces are there.

    target: .mp4, .mov (H.264), .mkv (FFV1), or a folder that takes PNGs. stamp: text that says how the pieces
    are made. resume: go on with the pieces of an interrupted run, if its stamp is the same; without it there must be
    none. A piece is a run of frames, named by the first; `has` tells whether it is there.
    """

    def __init__(self, target, stamp, resume):
        self.target, self.video = Path(target), Path(target).suffix != ""
        if self.target.is_symlink() and self.target.is_dir():
            self.target = self.target.resolve()                     # beside the folder, not beside the link to it
        self.folder = self.target.with_name(f".{self.target.name}.unfinished")
        try:
            self.folder.mkdir(exist_ok=True)
            self.note = open(self.folder / "stamp.txt", "a+")       # open, and locked, as long as this run lives
        except OSError as e:
            raise ValueError(f"{target}: not writable ({e.strerror}); name another output") from None
        try:
            self._check(stamp, resume)
        except ValueError:
            self.note.close()
            raise
        for half_written in self.folder.glob(".*"):                 # by a run that was killed
            half_written.unlink()
        self.note.truncate(0), self.note.write(stamp), self.note.flush()

    def _check(self, stamp, resume):
        """ValueError if another run writes these pieces, or has left some that are not to be used."""
        try:
            if fcntl:
                fcntl.flock(self.note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.target}: another run is writing it; wait, or name another output") from None
        if self._pieces() and not resume:
            raise ValueError(f"{self.target}: an interrupted run left {self.folder}; add --resume, or remove it")
        self.note.seek(0)
        if self._pieces() and self.note.read() != stamp:
            raise ValueError(f"{self.folder}: made with another input, checkpoint or setting; remove that folder")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.folder.exists() and not self._pieces():
            shutil.rmtree(self.folder)
        self.note.close()

    def _pieces(self):
        return sorted(self.folder.glob(f"[!.]*{self.target.suffix if self.video else '.png'}"))

    def _files(self, first, count):
        if self.video:
            return [self.folder / f"{first:08d}{self.target.suffix}"]
        return [self.folder / f"{i + 1:06d}.png" for i in range(first, first + count)]

    def has(self, first, count):
        """Whether frames first..first+count-1 were written as one piece."""
        return all(path.exists() for path in self._files(first, count))

    def write(self, first, frames, fps, aspect="1:1", times=None):
        """Add a piece, uint8 (F, H, W, 3), that begins with frame `first`."""
        files = self._files(first, len(frames))
        if self.video:
            with whole(files[0]) as tmp:
                encode(tmp, frames, fps, aspect=aspect, times=None if times is None else [t - times[0] for t in times])
        else:
            for path, frame in zip(files, frames, strict=True):
                write_image(path, frame)

    def finish(self, fps, source=None, begin=0.0, times=None):
        """Join the pieces under the name of the target, with the sound of `source`. Returns what is left out, and why.

        begin: seconds at which the first frame is shown. times: those of all frames, if the rate varies.
        """
        if not self.video:
            os.replace(self.folder, self.target)
            (self.target / "stamp.txt").unlink()
            return ""
        pieces, entries = self._pieces(), ["ffconcat version 1.0"]
        for i, piece in enumerate(pieces):
            name = str(piece.resolve()).replace("'", r"'\''")       # whole: FFmpeg would cut a # or ? off as of a URL
            entries.append(f"file '{name}'")
            if times is not None and i + 1 < len(pieces):
                entries.append(f"duration {times[int(pieces[i + 1].stem)] - times[int(piece.stem)]:.6f}")
        listed = self.folder / "pieces.txt"
        listed.write_bytes(os.fsencode("\n".join(entries)))         # names need not be UTF-8
        # the container of a piece may round times: frame N is shown at begin + N / fps, exactly
        clock = [] if times else [
            "-bsf:v", f"setts=ts=round(({begin:.6f}+N*{1 / fps})/TB):duration=round({1 / fps}/TB)"]
        video = ["-itsoffset", f"{begin:.6f}", "-f", "concat", "-safe", "0", "-i", listed]
        # some sound does not fit into some containers, and some is nothing that FFmpeg could decode
        tries = [(track, codec) for track in ("1:a?", "1:a:0?") for codec in ("copy", "aac")] if source else []
        reason = ""
        with whole(self.target) as tmp:
            for track, codec in [*tries, ("", "")]:
                sound = ["-i", source, "-map", "0:v", "-map", track, "-c:a", codec] if track else []
                try:
                    ffmpeg(["-y", *video, *sound, "-c:v", "copy", *clock, "-movflags", "+faststart", tmp])
                    break
                except ValueError as e:
                    reason = e
            else:
                raise ValueError(f"{self.target}: not written ({reason})")
        shutil.rmtree(self.folder)
        left_out = {"1:a?": "", "1:a:0?": "all sound but its first track", "": "its sound"}[track] if source else ""
        return left_out and f"{left_out} ({reason})"
