"""Frames of a video as a family's native video tensors, made by its image processor. torchvision is not needed."""

from __future__ import annotations

from typing import Any

import torch
from transformers.video_utils import VideoMetadata

from vlm2vec.media.videos import Frames

USUAL_FPS = 24.0  # the default of transformers


class FrameProcessor:
    """Takes the place of the video processor in a processor of transformers.

    It supports two layouts: patches of two frames together (the Qwen-VL line), and one tile per frame
    (LLaVA-OneVision). Frames get the size that the image processor gives an image.

    Args:
        images: The family's image processor.
        num_frames: Number of frames in the second layout. Shorter videos repeat their last frame, so that videos
            can be stacked.
    """

    def __init__(self, images: Any, num_frames: int) -> None:
        self.images, self.num_frames = images, num_frames
        self.merge_size = getattr(images, "merge_size", 1)
        self.temporal_patch_size = getattr(images, "temporal_patch_size", 1)

    @staticmethod
    def serves(processor: Any, accepted: set[str]) -> bool:
        """Whether the family has video inputs in one of these layouts."""
        families = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor", "LlavaOnevisionProcessor")
        return type(processor).__name__ in families and "pixel_values_videos" in accepted

    def to_dict(self) -> dict[str, Any]:
        """Settings that its tensors depend on, besides the image processor's."""
        return {"num_frames": self.num_frames}

    def __call__(self, videos: list[list[Any]], video_metadata: Any = None, **_: Any) -> dict[str, Any]:
        """Tensors of one video, a list of images."""
        frames = [frame.resize(videos[0][0].size) for frame in videos[0]]  # frames of a folder may differ in size
        if self.temporal_patch_size == 1:
            frames += frames[-1:] * (self.num_frames - len(frames))
            whole = [self.images(frame, return_tensors="pt")["pixel_values"][0, 0] for frame in frames]
            return {"pixel_values_videos": torch.stack(whole)[None]}
        frames += frames[-1:] * (-len(frames) % self.temporal_patch_size)
        output = self.images(frames, return_tensors="pt")
        _, down, across = output["image_grid_thw"][0].tolist()
        steps = len(frames) // self.temporal_patch_size
        # The image processor repeats an image for every frame of a patch; each frame contributes its own share.
        share_TJNCSP = output["pixel_values"].view(
            steps, self.temporal_patch_size, down * across, 3, self.temporal_patch_size, -1
        )
        mixed = torch.stack([share_TJNCSP[:, j, :, :, j] for j in range(self.temporal_patch_size)], dim=3)
        return {
            "pixel_values_videos": mixed.reshape(steps * down * across, -1),
            "video_grid_thw": torch.tensor([[steps, down, across]]),
            "video_metadata": [VideoMetadata(**video_metadata[0])],
        }


def metadata_of(frames: Frames) -> dict[str, Any]:
    """Metadata that transformers' processors need for time stamps in the prompt."""
    return {"total_num_frames": frames.total, "fps": frames.fps or USUAL_FPS, "frames_indices": list(frames.indices)}
