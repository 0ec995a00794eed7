# Homebrew formula, for a tap of the project. NOT RUN: no Mac was at hand. `url` and `sha256` are those of a release, of which there is
# none yet.
class Omlx < Formula
  desc "Local language models as a library behind one C header"
  homepage "https://example.invalid/libomlx"
  url "https://example.invalid/libomlx/archive/v0.1.0.tar.gz"
  sha256 "0000000000000000000000000000000000000000000000000000000000000000"
  license "Apache-2.0"

  depends_on "rust" => :build
  # The wheels of MLX are fetched with pip and checked by hash.
  depends_on "python@3.13" => :build
  depends_on arch: :arm64
  depends_on macos: :sonoma

  def install
    system "packaging/install", "--prefix", prefix
  end

  test do
    (testpath/"answer.c").write <<~C
      #include <omlx.h>
      #include <string.h>
      int main(void) {
        const char *json = "{\\"messages\\":[{\\"role\\":\\"user\\",\\"content\\":\\"Hello\\"}],\\"max_tokens\\":4}";
        const omlx_event *event = NULL;
        omlx_request *request = NULL;
        omlx_pool *pool = NULL;
        int status = 1;
        if (omlx_pool_open(NULL, &pool, NULL) || omlx_generate(pool, json, strlen(json), NULL, &request, NULL))
          return 1;
        while (omlx_request_next(request, -1, &event, NULL) == OMLX_OK)
          if (event->kind == OMLX_EVENT_KIND_DONE)
            status = event->status;
        omlx_request_release(request);
        omlx_pool_close(pool, NULL);
        omlx_pool_release(pool);
        return status;
      }
    C
    system ENV.cc, "answer.c", "-I#{include}", "-L#{lib}", "-lomlx", "-Wl,-rpath,#{lib}", "-o", "answer"
    system "./answer"
  end
end
