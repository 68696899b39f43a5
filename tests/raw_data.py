"""Raw data sets in the layouts of their projects, small: CALVIN's npz, LIBERO's HDF5, RLDS in TFRecord files."""

import io
import json
import struct

import h5py
import numpy as np
from PIL import Image

from vlm4vla.data.convert.tfrecord import masked_crc


def picture(number, height, width):
    """A smooth picture that tells its number, and which way up it is."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = 60 + 120 * rows / height
    return np.stack([red, 60 + 120 * columns / width, np.full_like(red, 20 + 10 * (number % 20))], -1).astype(np.uint8)


def calvin(
    folder,
    segments=((0, 4, "lift the red block"), (3, 6, "open the drawer"), (9, 11, "lift the red block")),
    seen=None,
):
    """Frames 0 to the last, of which ``segments`` (first, last, text) are annotated. Returns their rel_actions.

    ``seen``: arrays by name, a row a frame, in the place of those that are made up.
    """
    rng, frames = np.random.default_rng(0), max(last for _, last, _ in segments) + 1
    (folder / "lang_annotations").mkdir(parents=True)
    actions = rng.uniform(-1, 1, (frames, 7))
    actions[:, 6] = np.where(rng.random(frames) < 0.5, -1, 1)
    for i in range(frames):
        made_up = {
            "actions": rng.normal(size=7),
            "rel_actions": actions[i],
            "robot_obs": np.full(15, i, float),
            "scene_obs": rng.normal(size=24),
            "rgb_static": picture(i, 200, 200),
            "rgb_gripper": picture(i, 84, 84),
            "rgb_tactile": np.zeros((4, 4, 6), np.uint8),
            "depth_static": np.zeros((4, 4), np.float32),
            "depth_gripper": np.zeros((4, 4), np.float32),
        }
        np.savez(folder / f"episode_{i:07d}.npz", **made_up | {name: rows[i] for name, rows in (seen or {}).items()})
    annotations = {
        "language": {
            "ann": [text for _, _, text in segments],
            "task": ["_".join(text.split()) for _, _, text in segments],
            "emb": rng.normal(size=(len(segments), 1, 8)).astype(np.float32),
        },
        "info": {"episodes": [], "indx": [(first, last) for first, last, _ in segments]},
    }
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", annotations)  # pyright: ignore[reportArgumentType]
    return actions


def libero(path, actions, task="worded otherwise than the file's name", size=128, seen=None):
    """One task's file with a demonstration for each of ``actions`` (T, 7); ``task`` is what its BDDL file says.

    ``seen``: what stands below ``obs`` in each, by name; made up where there is none.
    """
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"problem_name": "libero", "language_instruction": [f'"{task}"']})
        data.attrs["env_args"] = "{}"
        for i, each in enumerate(actions):
            demo, t = data.create_group(f"demo_{i}"), len(each)
            demo["actions"] = each
            demo["states"] = np.zeros((t, 5))
            demo["robot_states"] = np.zeros((t, 9))
            demo["rewards"], demo["dones"] = np.zeros(t), np.zeros(t)
            for name, values in (seen[i] if seen else libero_seen(t, size)).items():
                demo[f"obs/{name}"] = values


def libero_seen(t, size):
    pictures = np.stack([picture(f, size, size) for f in range(t)])[:, ::-1, ::-1]
    dims = {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2, "ee_states": 6, "joint_states": 7}
    numbers = {name: np.arange(t)[:, None] + np.arange(width) / 10 for name, width in dims.items()}
    return {"agentview_rgb": pictures, "eye_in_hand_rgb": pictures, **numbers}


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def varint(number):
    number &= 0xFFFFFFFFFFFFFFFF
    result = b""
    while number >= 0x80:
        result += bytes([number & 0x7F | 0x80])
        number >>= 7
    return result + bytes([number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features):
    """A serialised ``tf.train.Example`` of bytes, float and integer lists."""
    entries = b""
    for name, values in features.items():
        if isinstance(values, list):
            feature = field(1, b"".join(field(1, value) for value in values))
        elif values.dtype.kind == "f":
            feature = field(2, field(1, values.astype("<f4").tobytes()))
        else:
            feature = field(3, field(1, b"".join(varint(int(value)) for value in values)))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def tfrecord(path, records):
    """Write serialised ``records`` with their check sums."""
    with path.open("wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + struct.pack("<I", masked_crc(length)))
            file.write(record + struct.pack("<I", masked_crc(record)))


def episode(images, actions, states, task, camera="image_0"):
    """RLDS: an episode is one example whose features are the steps' in a row."""
    steps = len(actions)
    return {
        f"steps/observation/{camera}": [jpeg(image) for image in images],
        "steps/observation/state": np.asarray(states, np.float32).ravel(),
        "steps/action": np.asarray(actions, np.float32).ravel(),
        "steps/language_instruction": [task.encode()] * steps,
        "steps/is_first": np.array([i == 0 for i in range(steps)], np.int64),
        "steps/discount": np.ones(steps, np.float32),
    }
