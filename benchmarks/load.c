/* An HTTP load generator on one thread: the same request again and again over keep-alive connections to loopback.
   load PORT CONNECTIONS SECONDS RATE FILE: FILE holds the request as it goes over the wire. RATE 0: each connection asks
   as soon as it has its answer. Otherwise RATE requests a second are due at even steps, and a latency counts from when
   its request was due, so a server that stalls is charged for those that it kept waiting.
   Prints one JSON object; latencies in milliseconds. Answers that are not 200 and
   requests whose connection the server closed are counted as failed. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { ROOM = 1 << 16, MOST = 1 << 22 };
typedef struct {
  int fd, busy, got, sent, left; /* left: bytes of the body to come, -1 while in the head */
  double due;
  char head[ROOM];
} Connection;

static char *request;
static int length, open_calls, failed, done, epoll;
static double *latency;
static struct sockaddr_in to = {.sin_family = AF_INET};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what) {
  perror(what);
  exit(1);
}

static void watch(Connection *c, int how, int what) {
  struct epoll_event event = {.events = what, .data.ptr = c};
  if (epoll_ctl(epoll, how, c->fd, &event)) die("epoll_ctl");
}

static void start(Connection *c) {
  int one = 1;
  c->fd = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(c->fd, (struct sockaddr *)&to, sizeof to)) die("connect");
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  watch(c, EPOLL_CTL_ADD, EPOLLIN);
}

/* A connection that the server has closed: what was on it has failed. */
static void again(Connection *c) {
  close(c->fd);
  open_calls -= c->busy, failed += c->busy, c->busy = 0;
  start(c);
}

static void put(Connection *c) {
  int n = write(c->fd, request + c->sent, length - c->sent);
  if (n > 0) c->sent += n;
  watch(c, EPOLL_CTL_MOD, c->sent < length ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

static void ask(Connection *c, double due) {
  c->busy = 1, c->got = 0, c->sent = 0, c->left = -1, c->due = due;
  open_calls++;
  put(c);
}

static void answered(Connection *c) {
  if (done < MOST) latency[done++] = now() - c->due;
  failed += strncmp(c->head + 9, "200", 3) != 0;
  c->busy = 0;
  open_calls--;
}

static void take(Connection *c) {
  static char waste[ROOM];
  char *into = c->left < 0 ? c->head + c->got : waste;
  int n = read(c->fd, into, c->left < 0 ? ROOM - 1 - c->got : ROOM);
  if (n <= 0) {
    again(c);
    return;
  }
  if (c->left >= 0) {
    c->left -= n;
  } else {
    c->got += n, c->head[c->got] = 0;
    char *end = strstr(c->head, "\r\n\r\n"), *size = strcasestr(c->head, "\r\ncontent-length:");
    if (!end) return;
    if (!size || size > end) die("an answer without a content-length");
    c->left = atoi(size + 17) - (c->got - (int)(end + 4 - c->head));
  }
  if (c->left == 0) answered(c);
}

static void read_request(const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) die(path);
  request = malloc(MOST), length = fread(request, 1, MOST, file);
  fclose(file);
}

static int ascending(const void *a, const void *b) {
  double d = *(const double *)a - *(const double *)b;
  return (d > 0) - (d < 0);
}

static double quantile(double q) { return done ? latency[(int)(q * (done - 1))] * 1000 : 0; }

int main(int argc, char **argv) {
  if (argc != 6) return fprintf(stderr, "load PORT CONNECTIONS SECONDS RATE FILE\n"), 2;
  int count = atoi(argv[2]), sent = 0;
  double seconds = atof(argv[3]), rate = atof(argv[4]), began, end, t;
  epoll = epoll_create1(0), latency = malloc(MOST * sizeof *latency);
  read_request(argv[5]);
  to.sin_port = htons(atoi(argv[1])), to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  Connection *all = calloc(count, sizeof *all);
  for (int i = 0; i < count; i++) start(&all[i]);
  struct epoll_event events[256];
  for (began = now(), end = began + seconds; (t = now()) < end || (open_calls && t < end + 10);) {
    for (int i = 0; i < count && t < end; i++) {
      if (all[i].busy || (rate && began + sent / rate > t)) continue;
      ask(&all[i], rate ? began + sent / rate : t);
      sent++;
    }
    int wait = rate && t < end ? 0 : 100; /* at a rate it spins on its core: epoll's clock is too coarse */
    for (int i = 0, n = epoll_wait(epoll, events, 256, wait); i < n; i++) {
      Connection *c = events[i].data.ptr;
      if (events[i].events & EPOLLOUT) put(c);
      if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) take(c);
    }
  }
  double took = now() - began;
  qsort(latency, done, sizeof *latency, ascending);
  printf("{\"requests\": %d, \"failed\": %d, \"per_s\": %.1f, \"p50_ms\": %.3f, \"p95_ms\": %.3f, \"p99_ms\": %.3f}\n", done,
         failed + open_calls, done / took, quantile(.5), quantile(.95), quantile(.99));
}
