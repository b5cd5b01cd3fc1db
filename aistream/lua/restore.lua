-- Writes a running session anew from its owner's memory, log and all: the store has lost it, or a part of its log.
-- KEYS  1 session hash, 2 log stream, 3 content hash, 4 deadlines zset, 5 hash of the init's idempotency key (or the session's own)
-- ARGV  1 id, 2 worker, 3 epoch, 4 lease in ms, 5 seconds to keep what is owed, 6 subject, 7 `start` entry, 8 request, 9 resumeUrl,
--       10 created_at, 11 deadline, 12 started_at, 13 '1' if it is cancelled when its last viewer has left,
--       14 the origin that its callback goes to, 15 and 16 digests of the init's idempotency key and of its body, or '',
--       17.. for each event of the log: id, entry name, entry value
-- gives 1, or 0 where it is somebody else's by now, or over
-- Atomic: a log without its first half, or a session without its log, must never be seen. Writes only where nothing stands, a
-- smaller epoch, or the worker's own. A cancel flag that stands there stays. Idempotent.
local epoch = tonumber(ARGV[3])
local s = redis.call('HMGET', KEYS[1], 'state', 'epoch', 'worker')
if s[1] then
  local stands = tonumber(s[2])
  if ENDED[s[1]] or stands > epoch or stands == epoch and s[3] ~= ARGV[2] then
    return 0
  end
end
redis.call('HSET', KEYS[1], 'state', 'running', 'epoch', epoch, 'worker', ARGV[2], 'nonce', '', 'rerun', '0',
  'subject', ARGV[6], 'start', ARGV[7], 'created_at', ARGV[10], 'deadline', ARGV[11], 'started_at', ARGV[12],
  'cancels', ARGV[13], 'viewer_seen', now_ms(), 'origin', ARGV[14], 'init_key', ARGV[15], 'init_body', ARGV[16])
if ARGV[15] ~= '' then
  redis.call('HSET', KEYS[5], 'id', ARGV[1], 'body', ARGV[16])
  redis.call('EXPIRE', KEYS[5], ARGV[5])
end
redis.call('HSET', KEYS[3], 'request', ARGV[8], 'resume_url', ARGV[9])
redis.call('DEL', KEYS[2])
for i = 17, #ARGV, 3 do
  redis.call('XADD', KEYS[2], ARGV[i], ARGV[i + 1], ARGV[i + 2])
end
redis.call('ZADD', KEYS[4], now_ms() + ARGV[4], ARGV[1])
for i = 1, 3 do
  redis.call('EXPIRE', KEYS[i], ARGV[5])
end
return 1
