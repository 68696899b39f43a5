"""The MuJoCo model: table, wall, cards, cube and a six-joint arm of primitive shapes, as MJCF text.

Arm: the WidowX 250s' joint order (waist, shoulder, elbow, forearm roll, wrist pitch, wrist roll) and looks, with longer
links (upper arm 0.30 m, forearm 0.29 m, hand 0.14 m; the original: 0.25, 0.25, 0.16), because on the shorter ones the
outer cards can not be reached with the gripper pointing down. All poses are in the base frame: x away from the robot,
y to its left, z up, metres; the table's surface is z = 0.
"""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's names come from compiled modules without type stubs.)

import io

import mujoco
import numpy as np
from PIL import Image

SHOULDER, UPPER_ARM, FOREARM, HAND = 0.13, 0.30, 0.29, 0.14
"""Height of the shoulder axis; lengths of the links; wrist to the centre of the finger pads."""
CUBE_HALF = 0.015
"""ManiSkill's PickCubeWidowX."""
CARD_HALF = 0.07
"""ManiSkill's PickCubeWidowX."""
CARD_HEIGHT = 0.001
MAX_CARDS = 9
CARD_PIXELS = 96
"""Side of a card's texture. Cards are up to 22 % of the picture's width, so 96 suffices up to 224 px."""
FINGER_OPEN = 0.036
"""Travel of each finger; the pads then stand 0.072 m apart."""
ARM_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_pitch", "wrist_roll")
JOINT_RANGE = ((-3.1, 3.1), (-1.9, 2.0), (-1.7, 1.7), (-3.1, 3.1), (-1.8, 2.2), (-3.1, 3.1))
TIMESTEP = 0.005

CAMERA_POSITION, CAMERA_TARGET, CAMERA_FOVY = (1.04, 0.0, 0.76), (0.285, 0.0, 0.055), 38.5
TABLE_COLOUR, WALL_COLOUR = (0.80, 0.60, 0.42), (0.86, 0.88, 0.86)


def _camera() -> str:
    z = np.subtract(CAMERA_POSITION, CAMERA_TARGET)
    z /= np.linalg.norm(z)
    x = np.array([0.0, 1.0, 0.0])
    axes = " ".join(f"{v:.6f}" for v in (*x, *np.cross(z, x)))
    position = " ".join(map(str, CAMERA_POSITION))
    return f'<camera name="main" pos="{position}" xyaxes="{axes}" fovy="{CAMERA_FOVY}"/>'


def _joint(name: str, axis: str, limits: tuple[float, float]) -> str:
    return f'<joint name="{name}" axis="{axis}" range="{limits[0]} {limits[1]}" damping="2" armature="0.05"/>'


def _finger(name: str, side: int) -> str:
    """``side`` +1: the finger at +y. The pad is what grasps; the plate is what is seen."""
    return f"""
    <body name="{name}" pos="{HAND} 0 0" gravcomp="1">
      <joint name="{name}" type="slide" axis="0 {side} 0" range="0 {FINGER_OPEN}" damping="10" armature="0.2"/>
      <geom class="look" type="box" size="0.032 0.0055 0.013" pos="-0.022 {side * 0.0095} 0" material="finger"/>
      <geom name="{name}" type="box" size="0.011 0.004 0.011" pos="0 {side * 0.004} 0" mass="0.05"
            friction="2 0.05 0.001" condim="4" solref="0.01 1" material="pad"/>
    </body>"""


def _arm() -> str:
    joints = [_joint(n, a, r) for n, a, r in zip(ARM_JOINTS, ("0 0 1", *["0 1 0"] * 2, "1 0 0", "0 1 0", "1 0 0"),
                                                 JOINT_RANGE, strict=True)]  # fmt: skip
    return f"""
    <geom class="look" type="cylinder" size="0.085 0.012" pos="0 0 0.012" material="dark"/>
    <geom class="look" type="cylinder" size="0.060 0.030" pos="0 0 0.050" material="link"/>
    <body name="shoulder" pos="0 0 {SHOULDER}" gravcomp="1">{joints[0]}
      <geom class="look" type="cylinder" size="0.050 0.030" pos="0 0 -0.035" material="dark"/>
      <geom class="look" type="capsule" size="0.045" fromto="0 -0.035 0 0 0.035 0" material="link"/>
      <body name="upper_arm" gravcomp="1">{joints[1]}
        <geom class="look" type="capsule" size="0.034" fromto="0 0 0.03 0 0 {UPPER_ARM - 0.02}" material="link"/>
        <geom class="look" type="cylinder" size="0.040 0.046" pos="0 0 {UPPER_ARM}" euler="1.5708 0 0"
              material="accent"/>
        <body name="forearm" pos="0 0 {UPPER_ARM}" gravcomp="1">{joints[2]}
          <geom class="look" type="capsule" size="0.032" fromto="0.02 0 0 {FOREARM / 2} 0 0" material="link"/>
          <body name="forearm_roll" gravcomp="1">{joints[3]}
            <geom class="look" type="capsule" size="0.026" fromto="{FOREARM / 2} 0 0 {FOREARM - 0.02} 0 0"
                  material="dark"/>
            <body name="wrist" pos="{FOREARM} 0 0" gravcomp="1">{joints[4]}
              <geom class="look" type="cylinder" size="0.027 0.034" euler="1.5708 0 0" material="accent"/>
              <geom class="look" type="capsule" size="0.021" fromto="0 0 0 0.05 0 0" material="dark"/>
              <body name="hand" gravcomp="1">{joints[5]}
                <geom class="look" type="box" size="0.020 0.050 0.017" pos="{HAND - 0.065} 0 0" material="link"/>
                <site name="ee" pos="{HAND} 0 0" size="0.002" group="4"/>
                {_finger("finger_left", 1)}{_finger("finger_right", -1)}
              </body></body></body></body></body></body>"""


def _wood(width: int = 512, height: int = 512, planks: int = 6) -> bytes:
    """A PNG of light planks with grain, tinted by the table's material colour."""
    rng = np.random.Generator(np.random.PCG64(7))
    u, v = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    plank = np.minimum((v * planks).astype(int), planks - 1)
    tone, phase = rng.uniform(0.93, 1.0, planks)[plank], rng.uniform(0, 6, planks)[plank]
    across = v * planks - plank
    rings = np.sin(2 * np.pi * (3.0 * across + 0.35 * np.sin(5 * u + phase) + phase)) * 0.018
    fibre = np.repeat(rng.normal(0, 0.012, (height, width // 32)), 32, axis=1)
    seam = np.where(np.minimum(across, 1 - across) < 0.012, 0.82, 1.0)
    grey = np.clip((tone + rings + fibre) * seam, 0, 1)
    buffer = io.BytesIO()
    Image.fromarray((np.repeat(grey[..., None], 3, 2) * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def build_model(image_size: int) -> mujoco.MjModel:
    """The compiled model with an off-screen buffer of ``image_size`` pixels."""
    cards = range(MAX_CARDS)
    textures = "".join(
        f'<texture name="card{i}" type="2d" builtin="flat" rgb1="1 1 1" width="{CARD_PIXELS}" height="{CARD_PIXELS}"/>'
        f'<material name="card{i}" texture="card{i}" specular="0.1" shininess="0.1"/>'
        for i in cards
    )
    card_bodies = "".join(
        f'<body name="card{i}" mocap="true" pos="0 0 -1"><geom name="card{i}" class="card" material="card{i}"/></body>'
        for i in cards
    )
    gains = ((1200, 40), (1600, 55), (1200, 40), (300, 9), (300, 9), (150, 4))
    motors = "".join(
        f'<position name="{n}" joint="{n}" kp="{kp}" kv="{kv}"/>' for n, (kp, kv) in zip(ARM_JOINTS, gains, strict=True)
    )
    motors += "".join(
        f'<position name="{n}" joint="{n}" kp="600" kv="25" ctrlrange="0 {FINGER_OPEN}" forcerange="-12 12"/>'
        for n in ("finger_left", "finger_right")
    )
    table, wall = (" ".join(map(str, c)) for c in (TABLE_COLOUR, WALL_COLOUR))
    xml = f"""
<mujoco model="grinningface">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <visual>
    <global offwidth="{image_size}" offheight="{image_size}"/>
    <quality offsamples="4" shadowsize="0"/>
    <headlight ambient="0.42 0.42 0.42" diffuse="0.35 0.35 0.35" specular="0.05 0.05 0.05"/>
    <map znear="0.02" zfar="8"/>
  </visual>
  <asset>
    <texture name="wood" type="2d" file="wood.png"/>
    <material name="table" texture="wood" rgba="{table} 1" specular="0.15" shininess="0.3"/>
    <material name="wall" rgba="{wall} 1" specular="0"/>
    <material name="link" rgba="0.20 0.22 0.25 1" specular="0.5" shininess="0.5"/>
    <material name="dark" rgba="0.10 0.11 0.13 1" specular="0.4" shininess="0.5"/>
    <material name="accent" rgba="0.62 0.65 0.70 1" specular="0.6" shininess="0.7"/>
    <material name="finger" rgba="0.93 0.55 0.16 1" specular="0.3"/>
    <material name="pad" rgba="0.15 0.15 0.16 1"/>
    <material name="cube" rgba="0.08 0.14 0.62 1" specular="0.3"/>
    {textures}
  </asset>
  <default>
    <default class="look"><geom contype="0" conaffinity="0" mass="0.2"/></default>
    <default class="card">
      <geom type="box" size="{CARD_HALF} {CARD_HALF} {CARD_HEIGHT / 2}" contype="0" conaffinity="0"/>
    </default>
  </default>
  <statistic center="0.35 0 0.1" extent="1"/>
  <worldbody>
    {_camera()}
    <light directional="true" pos="0.9 -0.7 1.8" dir="-0.35 0.35 -0.87" diffuse="0.45 0.45 0.43"
           specular="0.2 0.2 0.2"/>
    <geom name="table" type="box" size="0.65 0.90 0.03" pos="0.25 0 -0.03" material="table" friction="1 0.01 0.001"/>
    <geom name="wall" class="look" type="box" size="0.02 3 2" pos="-0.55 0 0" material="wall"/>
    {_arm()}
    {card_bodies}
    <body name="cube" pos="0.27 0 {CUBE_HALF}">
      <freejoint name="cube"/>
      <geom name="cube" type="box" size="{CUBE_HALF} {CUBE_HALF} {CUBE_HALF}" mass="0.03" material="cube"
            friction="1 0.02 0.001" condim="4"/>
    </body>
  </worldbody>
  <actuator>{motors}</actuator>
</mujoco>"""
    return mujoco.MjModel.from_xml_string(xml, {"wood.png": _wood()})
